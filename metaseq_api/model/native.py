"""A step as a CPU with kernels of our own runs it (`kernels.native`): what each token attends to is written down once a
step as plain integers, and each layer writes its keys and values and attends in one call.

The two roles are as in `attention`: generated tokens attend one by one over their blocks, a prompt's in tiles (in bf16
of 32 queries at fixed positions). So a token's bits depend on its own sequence alone; and, unlike there, a linear layer
gives a row the same bits among any number of rows. In bf16, where heads are not a multiple of 32 wide, prompts attend
by torch's kernel (`prefill`).

Knows the Batch and the cache's layout. Does not know the model.

Shapes: T tokens of the step, H heads, D head width.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.kernels.native import INPUTS, Native
from metaseq_api.kernels.structs import Step
from metaseq_api.model.cache import KVCache
from metaseq_api.model.prefill import Prefill, attend_prefill, plan_prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePlan:
    """A Batch as integers; `step` holds addresses of `words` and `room`."""

    native: Native
    step: Step
    words: array[int]
    room: Tensor
    token_ids_T: Tensor
    positions_T: Tensor
    logit_rows: Tensor
    prefills: tuple[Prefill, ...]
    half_filled: None = None
    """Nothing beyond a context is ever read."""


def plan_native(batch: Batch, cache: KVCache, native: Native) -> NativePlan:
    """Work out, once for all layers, what each token reads and where its key and value go."""
    keys, num, words = cache.keys[0], batch.num_tokens, batch.words
    here = keys.dtype == torch.float32 or keys.shape[-1] % INPUTS == 0
    step = Step(
        num_tokens=num,
        heads=cache.num_heads,
        dim=keys.shape[-1],
        size=cache.block_size,
        threads=torch.get_num_threads(),
    )
    room, logit_rows = native.plan(step, words, pieces=here)
    return NativePlan(
        native=native,
        step=step,
        words=words,
        room=room,
        token_ids_T=room[:num],
        positions_T=room[num : 2 * num],
        logit_rows=logit_rows,
        prefills=() if here else _prefills(batch, cache),
    )


def _prefills(batch: Batch, cache: KVCache) -> tuple[Prefill, ...]:
    """The prompts' share of a step, for torch's kernel."""
    found, first, keys = [], 0, cache.keys[0]
    for item in batch.items:
        if item.num_prompt:
            found.append(
                plan_prefill(
                    begin=first,
                    end=first + item.num_prompt,
                    start=item.start,
                    block_ids=item.block_ids[: -(-(item.start + item.num_prompt) // cache.block_size)],
                    dtype=keys.dtype,
                    device=keys.device,
                )
            )
        first += item.num_tokens
    return tuple(found)


def attend_native(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, layer: int, plan: NativePlan, cache: KVCache, scale: float
) -> Tensor:
    """Write the step's keys and values, and attend. Shapes: [T, H, D] each -> [T, H * D]."""
    plan.step.scale = scale
    out = plan.native.attend(plan.step, q_THD, k_THD, v_THD, cache.keys[layer], cache.values[layer])
    for p in plan.prefills:
        out[p.begin : p.end] = attend_prefill(q_THD, k_THD, v_THD, p, cache, layer, scale)
    return out
