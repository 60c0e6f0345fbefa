"""A step as a CPU with kernels of our own runs it (`kernels.native`): what each token attends to is written down once a
step as plain integers, and each layer writes its keys and values and attends in one call.

The two roles are as in `attention`: generated tokens attend one by one over their blocks, a prompt's in tiles of 32
queries at fixed positions. So a token's bits depend on its own sequence alone; and, unlike there, a linear layer gives
a row the same bits among any number of rows. In fp32, and where heads are not a multiple of 32 wide, prompts attend by
torch's kernel (`prefill`).

Knows the Batch and the cache's layout. Does not know the model.

Shapes: T tokens of the step, B generated ones, P pieces of prompts, N blocks of the longest table, H heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.kernels.native import INPUTS, Native, Step
from metaseq_api.model.cache import KVCache
from metaseq_api.model.prefill import Prefill, attend_prefill, plan_prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePlan:
    """A Batch as integers; `step` holds the addresses of `arrays`."""

    native: Native
    step: Step
    arrays: tuple[np.ndarray, ...]
    token_ids_T: Tensor
    positions_T: Tensor
    logit_rows: Tensor
    prefills: tuple[Prefill, ...]
    half_filled: None = None
    """Nothing beyond a context is ever read."""


def plan_native(batch: Batch, cache: KVCache, native: Native) -> NativePlan:
    """Work out, once for all layers, what each token reads and where its key and value go."""
    size, keys = cache.block_size, cache.keys[0]
    items = batch.items
    tokens = np.fromiter((t for i in items for t in i.token_ids), np.int64, batch.num_tokens)
    positions = np.concatenate([np.arange(i.start, i.context_len) for i in items])
    blocks = np.concatenate([np.array(i.block_ids, np.int32)[np.arange(i.start, i.context_len) // size] for i in items])
    ends = np.cumsum([i.num_tokens for i in items]).tolist()
    logit_rows = np.concatenate([np.arange(e - i.num_logits, e) for i, e in zip(items, ends, strict=True)])
    here = keys.dtype == torch.bfloat16 and keys.shape[-1] % INPUTS == 0
    pieces, elsewhere, singles = [], [], []
    for item, end in zip(items, ends, strict=True):
        begin, stop = end - item.num_tokens, end - item.num_tokens + item.num_prompt
        if item.num_prompt and here:
            pieces.append((begin, stop, item.start, item.block_ids))
        elif item.num_prompt:
            blocks_read = item.block_ids[: -(-(item.start + item.num_prompt) // size)]
            elsewhere.append(
                plan_prefill(
                    begin=begin, end=stop, start=item.start, block_ids=blocks_read, dtype=keys.dtype, device=keys.device
                )
            )
        singles += [(row, item.start + row - begin + 1, item.block_ids) for row in range(stop, end)]
    width = max(len(i.block_ids) for i in items)
    arrays = (
        blocks,
        (positions % size).astype(np.int32),
        *_columns(singles, 2),
        _tables([s[-1] for s in singles], width),
        *_columns(pieces, 3),
        _tables([p[-1] for p in pieces], width),
    )
    step = Step(
        *(a.ctypes.data for a in arrays),
        num_tokens=len(tokens),
        num_single=len(singles),
        num_pieces=len(pieces),
        width=width,
        heads=cache.num_heads,
        dim=keys.shape[-1],
        size=size,
        threads=torch.get_num_threads(),
    )
    return NativePlan(
        native=native,
        step=step,
        arrays=arrays,
        token_ids_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        logit_rows=torch.from_numpy(logit_rows),
        prefills=tuple(elsewhere),
    )


def _columns(rows: Sequence[tuple[Any, ...]], num: int) -> list[np.ndarray]:
    return [np.array([row[i] for row in rows], np.int32) for i in range(num)]


def _tables(block_ids: list[tuple[int, ...]], width: int) -> np.ndarray:
    """Block tables, each filled up with zeros that are never read."""
    table = np.zeros((len(block_ids), width), np.int32)
    for row, ids in zip(table, block_ids, strict=True):
        row[: len(ids)] = ids
    return table


def attend_native(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, layer: int, plan: NativePlan, cache: KVCache, scale: float
) -> Tensor:
    """Write the step's keys and values, and attend. Shapes: [T, H, D] each -> [T, H * D]."""
    plan.step.scale = scale
    out = plan.native.attend(plan.step, q_THD, k_THD, v_THD, cache.keys[layer], cache.values[layer])
    for p in plan.prefills:
        out[p.begin : p.end] = attend_prefill(q_THD, k_THD, v_THD, p, cache, layer, scale)
    return out
