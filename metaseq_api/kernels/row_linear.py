"""A linear layer of a single row, in Triton: one pass over the weight, with bias, ReLU and residual on the way out.

With one row the weight's bytes are all that costs, and each further kernel costs a start; products of many rows are
torch's. Each program takes a few outputs and adds up in fp32.

Knows tensors. Does not know which layers of a model are fused. What it must give is `reference`.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS, INPUTS, WARPS = 4, 1024, 4
"""Numbers of a weight that a program reads at once: OUTPUTS rows of INPUTS. `gpu_check` prints others beside these."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _row_linear(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    num_outputs,
    num_inputs,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    real = o < num_outputs
    row_O = o.to(tl.int64) * num_inputs
    sum_OI = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        i = start + tl.arange(0, INPUTS)
        x_I = tl.load(x_ptr + i, mask=i < num_inputs, other=0.0).to(tl.float32)
        inside = real[:, None] & (i < num_inputs)[None, :]
        w_OI = tl.load(weight_ptr + row_O[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_OI += w_OI * x_I[None, :]
    y_O = tl.sum(sum_OI, 1)
    if BIAS:
        y_O += tl.load(bias_ptr + o, mask=real, other=0.0).to(tl.float32)
    if RELU:
        y_O = tl.where(y_O < 0, 0.0, y_O)
    if RESIDUAL:
        y_O += tl.load(residual_ptr + o, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + o, y_O.to(y_ptr.dtype.element_ty), mask=real)


def row_linear(
    x_1I: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_1O: Tensor | None = None,
    *,
    relu: bool = False,
    shape: tuple[int, int, int] = (OUTPUTS, INPUTS, WARPS),
) -> Tensor:
    """relu?(x W^T + b) + residual, rounded once at the end. Shapes: -> [1, O]."""
    num_outputs, num_inputs = weight_OI.shape
    assert x_1I.shape == (1, num_inputs), x_1I.shape
    assert x_1I.is_contiguous()
    assert weight_OI.is_contiguous()
    assert residual_1O is None or residual_1O.is_contiguous()
    y_1O = torch.empty(1, num_outputs, dtype=x_1I.dtype, device=x_1I.device)
    outputs, inputs, warps = shape
    _row_linear[(triton.cdiv(num_outputs, outputs),)](
        x_1I,
        weight_OI,
        x_1I if bias_O is None else bias_O,
        x_1I if residual_1O is None else residual_1O,
        y_1O,
        num_outputs,
        num_inputs,
        BIAS=bias_O is not None,
        RESIDUAL=residual_1O is not None,
        RELU=relu,
        OUTPUTS=outputs,
        INPUTS=min(inputs, triton.next_power_of_2(num_inputs)),
        num_warps=warps,
    )
    return y_1O
