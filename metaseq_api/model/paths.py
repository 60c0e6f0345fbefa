"""Which way a step is planned and attended: decided here, by the device, and nowhere else.

A GPU with Triton goes by `paged`, a CPU with kernels of our own by `native`; any other by `attention`. Knows all three;
does none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.kernels import have_triton
from metaseq_api.kernels.native import Native, native_for
from metaseq_api.kernels.reference import DecodeAttention
from metaseq_api.model.attention import StepPlan, attend, plan_step
from metaseq_api.model.cache import KVCache
from metaseq_api.model.native import NativePlan, attend_native, plan_native
from metaseq_api.model.paged import PagedPlan, attend_paged, plan_paged

Plan = StepPlan | PagedPlan | NativePlan


def decode_kernel(device: torch.device) -> DecodeAttention | None:
    """The kernel for single tokens on this device, or None where torch's own operations serve."""
    if device.type != "cuda" or not have_triton():
        return None
    import torch.nn.attention.bias  # noqa: F401  # takes seconds, for which no request shall wait later

    from metaseq_api.kernels.decode_attention import decode_attention  # needs Triton

    return decode_attention


def score_kernels(device: torch.device) -> Native | None:
    """Kernels that choose and rate tokens on this device, or None where torch's own operations serve."""
    return native_for(torch.float32, device)


def plan(batch: Batch, cache: KVCache, device: torch.device, kernel: DecodeAttention | None) -> Plan:
    """A Batch as tensors on the device: by `paged` with a kernel for single tokens, else by `native` or `attention`."""
    if kernel is not None:
        return plan_paged(batch, cache, device, kernel)
    own = native_for(cache.keys[0].dtype, device)
    return plan_step(batch, cache, device) if own is None else plan_native(batch, cache, own)


def attend_by(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, layer: int, plan: Plan, cache: KVCache, scale: float
) -> Tensor:
    """Write a step's keys and values, and attend, the way that it was planned. Shapes: [T, H, D] each -> [T, H * D]."""
    if isinstance(plan, PagedPlan):
        return attend_paged(q_THD, k_THD, v_THD, layer=layer, plan=plan, cache=cache, scale=scale)
    if isinstance(plan, NativePlan):
        return attend_native(q_THD, k_THD, v_THD, layer=layer, plan=plan, cache=cache, scale=scale)
    return attend(q_THD, k_THD, v_THD, layer=layer, plan=plan, cache=cache, scale=scale)
