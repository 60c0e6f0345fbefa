"""A step as a CPU with kernels of our own runs it (`kernels.native`): what each token attends to is written down once a
step as plain integers, and each layer writes its keys and values and attends in one call.

The two roles are as in `attention`: generated tokens attend one by one over their blocks, a prompt's in tiles (in bf16
of 32 queries at fixed positions). So a token's bits depend on its own sequence alone; and, unlike there, a linear layer
gives a row the same bits among any number of rows. In bf16, where heads are not a multiple of 32 wide, prompts attend
by torch's kernel (`prefill`).

Knows the Batch and the cache's layout. Does not know the model.

Shapes: T tokens of the step, N items, W blocks of the longest table, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from metaseq_api.core import Batch, BatchItem
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
    rows = _Rows(batch, size)
    prompts = [n for n, item in enumerate(batch.items) if item.num_prompt]
    here = keys.dtype == torch.float32 or keys.shape[-1] % INPUTS == 0
    pieces, elsewhere = (prompts, []) if here else ([], prompts)
    single = np.flatnonzero(rows.at_T >= rows.num_prompt_N[rows.item_T])
    arrays = (
        rows.block_T,
        (rows.position_T % size).astype(np.int32),
        single.astype(np.int32),
        (rows.position_T[single] + 1).astype(np.int32),
        rows.table_NW[rows.item_T[single]],
        rows.first_N[pieces].astype(np.int32),
        (rows.first_N + rows.num_prompt_N)[pieces].astype(np.int32),
        rows.start_N[pieces].astype(np.int32),
        rows.table_NW[pieces],
    )
    step = Step(
        *(a.ctypes.data for a in arrays),
        num_tokens=len(rows.token_T),
        num_single=len(single),
        num_pieces=len(pieces),
        width=rows.table_NW.shape[1],
        heads=cache.num_heads,
        dim=keys.shape[-1],
        size=size,
        threads=torch.get_num_threads(),
    )
    return NativePlan(
        native=native,
        step=step,
        arrays=arrays,
        token_ids_T=torch.from_numpy(rows.token_T),
        positions_T=torch.from_numpy(rows.position_T),
        logit_rows=torch.from_numpy(rows.wanted),
        prefills=tuple(_prefill(batch.items[n], int(rows.first_N[n]), cache) for n in elsewhere),
    )


class _Rows:
    """A Batch of N items as columns: of the items, and of the T tokens they feed."""

    def __init__(self, batch: Batch, size: int) -> None:
        items, num = batch.items, len(batch.items)
        about = np.array([(i.start, len(i.token_ids), len(i.block_ids), i.num_prompt, i.num_logits) for i in items])
        self.start_N, len_N, blocks_N, self.num_prompt_N, num_logits_N = about.T
        self.first_N = len_N.cumsum() - len_N
        """Its first row among the tokens."""
        self.token_T = np.fromiter(chain.from_iterable(i.token_ids for i in items), np.int64, int(len_N.sum()))
        self.item_T = np.arange(num).repeat(len_N)
        self.at_T = np.arange(len(self.token_T)) - self.first_N[self.item_T]
        """Its place among those of its item."""
        self.position_T = self.at_T + self.start_N[self.item_T]
        self.wanted = np.flatnonzero(self.at_T >= (len_N - num_logits_N)[self.item_T])
        """Rows of which logits are."""
        self.table_NW = np.zeros((num, int(blocks_N.max())), np.int32)
        """Block tables, each filled up with zeros that are never read."""
        flat = np.fromiter(chain.from_iterable(i.block_ids for i in items), np.int32, int(blocks_N.sum()))
        self.table_NW[np.arange(self.table_NW.shape[1]) < blocks_N[:, None]] = flat
        self.block_T = self.table_NW[self.item_T, self.position_T // size]


def _prefill(item: BatchItem, first: int, cache: KVCache) -> Prefill:
    """A prompt's share of a step for torch's kernel."""
    return plan_prefill(
        begin=first,
        end=first + item.num_prompt,
        start=item.start,
        block_ids=item.block_ids[: -(-(item.start + item.num_prompt) // cache.block_size)],
        dtype=cache.keys[0].dtype,
        device=cache.keys[0].device,
    )


def attend_native(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, layer: int, plan: NativePlan, cache: KVCache, scale: float
) -> Tensor:
    """Write the step's keys and values, and attend. Shapes: [T, H, D] each -> [T, H * D]."""
    plan.step.scale = scale
    out = plan.native.attend(plan.step, q_THD, k_THD, v_THD, cache.keys[layer], cache.values[layer])
    for p in plan.prefills:
        out[p.begin : p.end] = attend_prefill(q_THD, k_THD, v_THD, p, cache, layer, scale)
    return out
