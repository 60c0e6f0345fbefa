"""A linear layer of a single row, in Triton: one pass over the weight, perhaps with a layer norm of the row before it,
and with bias, ReLU and residual on the way out.

With one row the weight's bytes are all that costs, and each further kernel costs a start; products of many rows are
torch's. Each program takes a few outputs and adds up in fp32, a tile of its weight always on the way while the one
before is multiplied. Each norms the row for itself: it lies in the second cache, and the weight is on its way by then.

Knows tensors. Does not know which layers of a model are fused. What it must give is `reference`.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from metaseq_api.kernels.reference import NormWeights

OUTPUTS, INPUTS, WARPS = 4, 1024, 4
"""Numbers of a weight that a program reads at once: OUTPUTS rows of INPUTS. `gpu_check` prints others beside these."""
NORMED = 2048
"""Numbers of a row to be normed that a warp holds at most."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _row_linear(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    num_outputs,
    num_inputs,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    EARLY: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    real = o < num_outputs
    i = tl.arange(0, INPUTS)
    at_OI = weight_ptr + o.to(tl.int64)[:, None] * num_inputs + i[None, :]
    w_OI = tl.load(at_OI, mask=real[:, None] & (i < num_inputs)[None, :], other=0.0)
    if EARLY:
        gdc_wait()  # weights are there at all times; the row is what the kernel before writes

    mean, scale = 0.0, 1.0
    if NORM:
        d = tl.arange(0, WHOLE)
        x_D = tl.load(x_ptr + d, mask=d < num_inputs, other=0.0).to(tl.float32)
        mean = tl.sum(x_D, 0) / num_inputs
        off_D = tl.where(d < num_inputs, x_D - mean, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(off_D * off_D, 0) / num_inputs + eps)

    sum_OI = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
    for start in range(0, num_inputs, INPUTS):
        i = start + tl.arange(0, INPUTS)
        x_I = tl.load(x_ptr + i, mask=i < num_inputs, other=0.0).to(tl.float32)
        if NORM:
            norm_w_I = tl.load(norm_weight_ptr + i, mask=i < num_inputs, other=0.0).to(tl.float32)
            norm_b_I = tl.load(norm_bias_ptr + i, mask=i < num_inputs, other=0.0).to(tl.float32)
            x_I = ((x_I - mean) * scale * norm_w_I + norm_b_I).to(x_ptr.dtype.element_ty).to(tl.float32)
        more = (start + INPUTS + tl.arange(0, INPUTS)) < num_inputs
        next_OI = tl.load(at_OI + (start + INPUTS), mask=real[:, None] & more[None, :], other=0.0)
        sum_OI += w_OI.to(tl.float32) * x_I[None, :]
        w_OI = next_OI
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
    norm: NormWeights | None = None,
    relu: bool = False,
    early: bool = False,
    shape: tuple[int, int, int] = (OUTPUTS, INPUTS, WARPS),
) -> Tensor:
    """relu?(norm?(x) W^T + b) + residual, rounded once at the end, and after a norm. Shapes: -> [1, O].

    early: it may start before the kernel before it has ended, which it then waits for with its first weights at hand.
    """
    num_outputs, num_inputs = weight_OI.shape
    assert x_1I.shape == (1, num_inputs), x_1I.shape
    assert x_1I.is_contiguous()
    assert weight_OI.is_contiguous()
    assert residual_1O is None or residual_1O.is_contiguous()
    y_1O = torch.empty(1, num_outputs, dtype=x_1I.dtype, device=x_1I.device)
    outputs, inputs, warps = shape
    whole = triton.next_power_of_2(num_inputs)
    _row_linear[(triton.cdiv(num_outputs, outputs),)](
        x_1I,
        x_1I if norm is None else norm.weight,
        x_1I if norm is None else norm.bias,
        weight_OI,
        x_1I if bias_O is None else bias_O,
        x_1I if residual_1O is None else residual_1O,
        y_1O,
        num_outputs,
        num_inputs,
        0.0 if norm is None else norm.eps,
        NORM=norm is not None,
        BIAS=bias_O is not None,
        RESIDUAL=residual_1O is not None,
        RELU=relu,
        EARLY=early,
        OUTPUTS=outputs,
        INPUTS=min(inputs, whole),
        WHOLE=1 if norm is None else whole,
        num_warps=warps if norm is None else max(warps, whole // NORMED),
        **({"launch_pdl": True} if early else {}),
    )
    return y_1O
