"""Kernels for a GPU, each beside what torch does without it. Nothing here is imported unless a GPU is at hand.

Knows tensors. Does not know models, batches or ranks. Triton comes with torch's CUDA builds; a machine without it is
served by torch's own operations (`have_triton`).
"""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def have_triton() -> bool:
    """Whether kernels can be compiled here; asked without importing it."""
    return importlib.util.find_spec("triton") is not None
