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
from metaseq_api.kernels.reference import Kernels
from metaseq_api.model.attention import StepPlan, attend, plan_step
from metaseq_api.model.cache import KVCache
from metaseq_api.model.native import NativePlan, attend_native, plan_native
from metaseq_api.model.paged import PagedPlan, attend_paged, plan_paged

Plan = StepPlan | PagedPlan | NativePlan
GpuKernels = Kernels
"""For those above, who know no kernels."""


def gpu_kernels(device: torch.device, *, early: bool = False) -> Kernels | None:
    """Those that a step on this device is made of, or None where torch's own operations serve. early: `kernels.gpu`."""
    if device.type != "cuda" or not have_triton():
        return None
    import torch.nn.attention.bias  # noqa: F401  # takes seconds, for which no request shall wait later

    from metaseq_api.kernels.gpu import kernels  # needs Triton

    return kernels(early=early)


def starts_early(device: torch.device) -> bool:
    """Whether a kernel can start there before the one before has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def score_kernels(device: torch.device) -> Native | None:
    """Kernels that choose and rate tokens on this device, or None where torch's own operations serve."""
    return native_for(torch.float32, device)


def plan(batch: Batch, cache: KVCache, device: torch.device, kernels: Kernels | None) -> Plan:
    """A Batch as tensors on the device: by `paged` with these kernels, else by `native` or `attention`."""
    if kernels is not None:
        return plan_paged(batch, cache, device, kernels)
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
