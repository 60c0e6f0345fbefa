"""A sum and the layer norm of it, in Triton: what lies between two linear layers, in one pass over it.

Each program takes a row, which it holds whole. Knows tensors; what it must give is `reference.add_norm`.

Shapes: T rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from metaseq_api.kernels.reference import NormWeights

NUMBERS = 1024
"""Of a row, for each warp of a program."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_norm(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, weight_ptr, bias_ptr, sum_ptr, normed_ptr, width, eps, EARLY: tl.constexpr, WHOLE: tl.constexpr
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * width
    d = tl.arange(0, WHOLE)
    real = d < width
    x_D = tl.load(x_ptr + row + d, mask=real, other=0.0).to(tl.float32)
    y_D = tl.load(y_ptr + row + d, mask=real, other=0.0).to(tl.float32)
    rounded_D = (x_D + y_D).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row + d, rounded_D, mask=real)
    sum_D = rounded_D.to(tl.float32)
    mean = tl.sum(sum_D, 0) / width
    off_D = tl.where(real, sum_D - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(off_D * off_D, 0) / width + eps)
    weight_D = tl.load(weight_ptr + d, mask=real, other=0.0).to(tl.float32)
    bias_D = tl.load(bias_ptr + d, mask=real, other=0.0).to(tl.float32)
    normed_D = off_D * scale * weight_D + bias_D
    tl.store(normed_ptr + row + d, normed_D.to(normed_ptr.dtype.element_ty), mask=real)


def add_norm(x_TD: Tensor, y_TD: Tensor, norm: NormWeights, *, early: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference.add_norm`. early: it may start before the kernel before it has ended, which it then waits for."""
    assert x_TD.shape == y_TD.shape
    assert x_TD.dtype == y_TD.dtype
    assert x_TD.is_contiguous()
    assert y_TD.is_contiguous()
    num, width = x_TD.shape
    sum_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    whole = triton.next_power_of_2(width)
    _add_norm[(num,)](
        x_TD,
        y_TD,
        norm.weight,
        norm.bias,
        sum_TD,
        normed_TD,
        width,
        norm.eps,
        EARLY=early,
        WHOLE=whole,
        num_warps=min(max(whole // NUMBERS, 1), 16),
        **({"launch_pdl": True} if early else {}),
    )
    return sum_TD, normed_TD
