"""What a GPU's steps are made of where Triton is: these three kernels, in the place of `reference.PLAIN`."""

from __future__ import annotations

from functools import partial

from metaseq_api.kernels.add_norm import add_norm
from metaseq_api.kernels.decode_attention import decode_attention
from metaseq_api.kernels.reference import Kernels
from metaseq_api.kernels.row_linear import row_linear


def kernels(*, early: bool = False) -> Kernels:
    """early: each may start before the one before it has ended (programmatic dependent launch, from Hopper on)."""
    return Kernels(
        decode_attention=partial(decode_attention, early=early),
        row_linear=partial(row_linear, early=early),
        add_norm=partial(add_norm, early=early),
    )
