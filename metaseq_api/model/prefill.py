"""Attention of a prompt's tokens, by torch's fused kernel.

On a CPU in tiles of TILE queries that lie at multiples of TILE in the prompt, each over the context up to the tile's
end, zeros where there is nothing (yet): so every product that a token takes part in has the same shapes, and its row
the same bits, however the prompt was cut into chunks and whatever part of it was found in the cache. Left to itself the
kernel takes 32 to 256 queries at once by how many there are, and its bits follow. Tiles cost nothing: 1024 tokens, 12
heads of 64, took 27.6 ms of one core a layer instead of 31.7 (fp32) and 34.5 instead of 43.2 (bf16), since less of the
masked half is computed; tiles of 64 and 128 took as long (2026-11-20, EPYC Zen 4). Elsewhere a chunk is done in one
piece, and its bits may depend on where it was cut.

Knows the cache's layout. Does not know the Batch or the model.

Shapes: T tokens of the step, L queries of a prompt in whole tiles, C context in whole tiles, H heads of this rank,
N blocks, S tokens of a block, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metaseq_api.model.cache import KVCache

TILE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prompt's (or chunk's) tokens: rows [begin, end) of the step, the first at position `start`."""

    begin: int
    end: int
    start: int
    blocks: Tensor
    """All blocks of its context; read only where start > 0."""
    mask: Tensor | None
    """In tiles: [TILE, C] to be added, whose last columns are each tile's own: the causal triangle, zeros before it.
    In one piece: [end - begin, context], True where a token may look; None for the plain causal triangle."""

    @property
    def context_len(self) -> int:
        return self.start + self.end - self.begin


def plan_prefill(
    *, begin: int, end: int, start: int, block_ids: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Prefill:
    """Work out, once for all layers, where a prompt's tokens may look."""
    context = start + end - begin
    mask = None
    if device.type == "cpu":
        mask = torch.zeros(TILE, _up(context), dtype=dtype)
        mask[:, -TILE:] = torch.full((TILE, TILE), -torch.inf).triu(1)
    elif start:
        at = torch.arange(start, context, device=device)
        mask = at[:, None] >= torch.arange(context, device=device)
    blocks = torch.tensor(block_ids, device=device)
    return Prefill(begin=begin, end=end, start=start, blocks=blocks, mask=mask)


def attend_prefill(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, p: Prefill, cache: KVCache, layer: int, scale: float
) -> Tensor:
    """The prompt's rows; its keys and values are in the cache. Shapes: [T, H, D] each -> [end - begin, H * D]."""
    tiled = q_THD.device.type == "cpu"
    context = _up(p.context_len) if tiled else p.context_len
    if p.start:
        k_HCD, v_HCD = (_found(x[layer], p, context) for x in (cache.keys, cache.values))
    else:
        k_HCD, v_HCD = (_laid_out(x[p.begin : p.end], 0, context) for x in (k_THD, v_THD))
    if tiled:
        return _by_tiles(q_THD[p.begin : p.end], k_HCD, v_HCD, p, scale)
    q_HTD = q_THD[p.begin : p.end].transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q_HTD[None], k_HCD[None], v_HCD[None], attn_mask=p.mask, is_causal=p.mask is None, scale=scale
    )
    return out[0].transpose(0, 1).flatten(1)


def _by_tiles(q_THD: Tensor, k_HCD: Tensor, v_HCD: Tensor, p: Prefill, scale: float) -> Tensor:
    first, last = p.start // TILE * TILE, k_HCD.shape[1]
    q_HLD = _laid_out(q_THD, p.start - first, last - first)
    assert p.mask is not None
    tiles = [
        F.scaled_dot_product_attention(
            q_HLD[None, :, end - TILE - first : end - first],
            k_HCD[None, :, :end],
            v_HCD[None, :, :end],
            attn_mask=p.mask[:, last - end :],
            scale=scale,
        )[0].transpose(0, 1)
        for end in range(first + TILE, last + 1, TILE)
    ]
    return torch.cat(tiles)[p.start - first : p.context_len - first].flatten(1)


def _laid_out(x_THD: Tensor, before: int, total: int) -> Tensor:
    """Rows by heads, zeros before and behind them. Shapes: -> [H, total, D]."""
    after = total - before - x_THD.shape[0]
    return F.pad(x_THD.transpose(0, 1), (0, 0, before, after)).contiguous()


def _found(pool_PHSD: Tensor, p: Prefill, total: int) -> Tensor:
    """One sequence's keys or values in order, zeros behind its context. Shapes: -> [H, total, D]."""
    x_NHSD = pool_PHSD.index_select(0, p.blocks)
    num, heads, size, width = x_NHSD.shape
    x_HCD = x_NHSD.new_empty(heads, max(num * size, total), width)
    x_HCD[:, : num * size].view(heads, num, size, width).copy_(x_NHSD.transpose(0, 1))
    x_HCD[:, p.context_len : total] = 0
    return x_HCD[:, :total]


def _up(num: int) -> int:
    """The next multiple of TILE."""
    return -(-num // TILE) * TILE
