"""Attention over the paged cache, in plain torch operations: planned once a step, run once a layer.

A prompt's tokens attend in one way (`prefill`), generated ones in another (`decode`), whatever else is in the step and
however often they are computed: a prompt's last token alone is still a prompt's, and a sequence that lost its blocks
feeds what it had generated as generated tokens, many in one step. On a CPU the numbers of a token then depend on the
tokens before it, on which of these were generated, and on nothing else, bit by bit: not on the batch, chunks, found
blocks, or where blocks lie. That rests on linear layers (`parallel.layers`) and norms giving a row the same bits among
any others. It does not hold between numbers of threads, machines or versions of torch, nor where more than two ranks
are summed in rings, whose order depends on a tensor's size. On a GPU it is not promised.

Knows the Batch and the cache's layout. Does not know the model.

Shapes: T tokens of the step, B generated ones, H heads of this rank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metaseq_api.core import Batch, BatchItem
from metaseq_api.model.cache import KVCache
from metaseq_api.model.decode import MOST, Decode, Token, alike, attend_decode, plan_decode
from metaseq_api.model.prefill import Prefill, attend_prefill, plan_prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A Batch as tensors on the rank's device."""

    token_ids_T: Tensor
    positions_T: Tensor
    cache_rows: Tensor
    half_filled: Tensor | None
    logit_rows: Tensor
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]


def plan_step(batch: Batch, cache: KVCache, device: torch.device) -> StepPlan:
    """Work out, once for all layers, what each token reads and where its keys and values go."""
    size = cache.block_size
    tokens = np.fromiter((t for i in batch.items for t in i.token_ids), np.int64, batch.num_tokens)
    positions = np.concatenate([np.arange(i.start, i.context_len) for i in batch.items])
    blocks = np.concatenate([_blocks_of_tokens(i, size) for i in batch.items])
    ends = np.cumsum([i.num_tokens for i in batch.items])
    logit_rows = np.concatenate([np.arange(e - i.num_logits, e) for i, e in zip(batch.items, ends, strict=True)])
    half = [i.block_ids[-1] for i in batch.items if i.context_len % size and i.start <= i.context_len // size * size]
    dtype, width = cache.keys[0].dtype, cache.keys[0].shape[-1]
    prefills, generated = _split(batch, ends.tolist(), size, dtype, device)
    joint = alike(dtype, size, width, device)

    def put(a: np.ndarray) -> Tensor:
        return torch.from_numpy(a).to(device, non_blocking=True)

    return StepPlan(
        token_ids_T=put(tokens),
        positions_T=put(positions),
        cache_rows=cache.rows(put(blocks), put(positions % size)),
        half_filled=put(np.array(half, np.int64)) if half else None,
        logit_rows=put(logit_rows),
        prefills=prefills,
        decodes=tuple(
            plan_decode(generated[at : at + MOST], size, device, joint=joint) for at in range(0, len(generated), MOST)
        ),
    )


def _split(
    batch: Batch, ends: list[int], size: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Prefill, ...], list[Token]]:
    """Each item's tokens of its prompt, and all that were generated."""
    prefills, generated = [], []
    for item, end in zip(batch.items, ends, strict=True):
        begin, stop = end - item.num_tokens, end - item.num_tokens + item.num_prompt
        if item.num_prompt:
            blocks = item.block_ids[: -(-(item.start + item.num_prompt) // size)]
            prefills.append(
                plan_prefill(begin=begin, end=stop, start=item.start, block_ids=blocks, dtype=dtype, device=device)
            )
        for row in range(stop, end):
            context = item.start + row - begin + 1
            generated.append(Token(row=row, context_len=context, block_ids=item.block_ids[: -(-context // size)]))
    return tuple(prefills), generated


def _blocks_of_tokens(item: BatchItem, size: int) -> np.ndarray:
    return np.asarray(item.block_ids, np.int64)[np.arange(item.start, item.context_len) // size]


def attend(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, layer: int, plan: StepPlan, cache: KVCache, scale: float
) -> Tensor:
    """Write the step's keys and values, and attend. Shapes: [T, H, D] each -> [T, H * D]."""
    cache.write(layer, plan.cache_rows, k_THD, v_THD)
    keys, values = cache.keys[layer], cache.values[layer]
    if len(plan.decodes) == 1 and not plan.prefills:
        return attend_decode(q_THD, keys, values, plan.decodes[0], scale)
    out = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2])
    for p in plan.prefills:
        out[p.begin : p.end] = attend_prefill(q_THD, k_THD, v_THD, p, cache, layer, scale)
    for d in plan.decodes:
        out.index_copy_(0, d.rows_B, attend_decode(q_THD.index_select(0, d.rows_B), keys, values, d, scale))
    return out
