"""Attention of generated tokens, each the only one of its sequence in a step or one of several computed anew.

They are done together in matrix products over *blocks*, which read the cache where it lies: each block is multiplied by
its owner's query (by those of all its owners, where sequences share a head), the scores are put back in each sequence's
order for the softmax, and the weighted values are summed by owner. Against gathering the cache first this took 0.99 ms
instead of 7.2 (bf16) and 1.4 instead of 5.0 (fp32) for 32 sequences of 256 tokens, 12 heads of 64 (2026-11-20, two
cores of an EPYC Zen 5).

On a CPU a row's bits depend on its own sequence alone, not on the others, or on where its blocks lie:
1. a block's product with one query has the same bits among however many blocks. With several queries it has them in
   bf16 (oneDNN), but not in fp32 (MKL sums in another order for one row): `alike` tries that out, and where they differ
   a shared block is multiplied by each of its owners apart. That costs what blocks of their own would cost;
2. the softmax over a longer padded range adds zeros, in lanes of LANES, so that a range is never shorter than that;
3. the weighted values of a sequence's blocks are added one after another in fp32.

Knows blocks and who owns them. Does not know the Batch or the model.

Shapes: B generated tokens, N most blocks of one of them, R block rows that are multiplied, M owners of each, Q block
entries of all B tokens together, H heads of this rank, S tokens of a block, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

WASTE, RANGES, GAP = 2, 8, 8
"""In place, products run over ranges of the pool, at most RANGES of them, cut where at least GAP blocks lie between;
where fewer than 1 in WASTE blocks of these is wanted, they are copied together first."""
LANES = 32
"""No vector unit has more lanes of fp32; torch sums shorter rows in another order."""
MOST = 256
"""Tokens done together, which bounds the memory of their scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Blocks close together that are multiplied by equally many queries: one matrix product."""

    first: int
    last: int
    gather_R: Tensor | None
    """Blocks to copy together, or None: rows are the pool's blocks [first, last)."""
    owner_RM: Tensor

    def of(self, pool_PHSD: Tensor) -> Tensor:
        """Their keys or values. Shapes: -> [R, H, S, D]."""
        return pool_PHSD[self.first : self.last] if self.gather_R is None else pool_PHSD.index_select(0, self.gather_R)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Where each token's blocks are among the rows (R * M of one Rows, then of the next), and back."""

    rows_B: Tensor
    rows: tuple[Rows, ...]
    table_BN: Tensor
    masked_B1NS: Tensor
    entry_row_Q: Tensor
    entry_slot_Q: Tensor
    entry_owner_Q: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A generated token: its row of the step, and the context it may look at, itself included."""

    row: int
    context_len: int
    block_ids: Seq[int]


def plan_decode(tokens: Seq[Token], size: int, device: torch.device, *, joint: bool) -> Decode:
    """Lay out the products of at most MOST tokens over blocks of `size`; `joint` as `alike` finds."""
    counts = np.array([len(t.block_ids) for t in tokens])
    entries = np.concatenate([np.asarray(t.block_ids, np.int64) for t in tokens])
    owners = np.repeat(np.arange(len(tokens)), counts)
    widest = max(int(counts.max()), -(-LANES // size))
    slots = owners * widest + np.concatenate([np.arange(c) for c in counts])
    rows, at = _plan_rows(entries, owners, device, joint)
    table = np.zeros(len(tokens) * widest, np.int64)
    table[slots] = at
    contexts = np.array([t.context_len for t in tokens])
    masked = np.arange(widest * size)[None] >= contexts[:, None]

    def put(a: np.ndarray) -> Tensor:
        return torch.from_numpy(a).to(device, non_blocking=True)

    return Decode(
        rows_B=put(np.array([t.row for t in tokens])),
        rows=rows,
        table_BN=put(table),
        masked_B1NS=put(masked.reshape(len(tokens), 1, widest, size)),
        entry_row_Q=put(at),
        entry_slot_Q=put(slots),
        entry_owner_Q=put(owners),
    )


@cache
def alike(dtype: torch.dtype, size: int, width: int, device: torch.device) -> bool:
    """Whether a query has the same bits in a product of one as in one of several. Not asked of a GPU: joint there."""
    if device.type != "cpu":
        return True
    random = torch.Generator().manual_seed(0)
    k_RHSD, q_BHD = (torch.randn(2, 2, n, width, generator=random).to(dtype) for n in (size, MOST))
    q_BHD, p_BHS = q_BHD[0].transpose(0, 1), torch.rand(MOST, 2, size, generator=random).to(dtype)

    def several(num: int) -> tuple[Tensor, Tensor]:
        owner_RM = torch.arange(num).repeat(2, 1)
        s_RMHS = _scores(q_BHD, k_RHSD, owner_RM, width**-0.5).view(2, num, 2, size)
        return s_RMHS[:, 0], _weighted(p_BHS[:num].repeat(2, 1, 1), k_RHSD).view(2, num, -1)[:, 0]

    alone, *others = [several(1 << n) for n in range(MOST.bit_length())]
    return all(torch.equal(a, b) for other in others for a, b in zip(alone, other, strict=True))


def _plan_rows(
    entries: np.ndarray, owners: np.ndarray, device: torch.device, joint: bool
) -> tuple[tuple[Rows, ...], np.ndarray]:
    """The products to be made, and the place of each entry among all their rows.

    A block's owners come together, up to the next power of two of them; or, not joint, the nth owners of all blocks.
    """
    _, index, nums = np.unique(entries, return_inverse=True, return_counts=True)
    nth = np.empty_like(entries)  # of its block's owners
    nth[np.argsort(entries, kind="stable")] = np.arange(len(entries)) - np.repeat(np.cumsum(nums) - nums, nums)
    kind = (1 << np.ceil(np.log2(nums)).astype(np.int64))[index] if joint else nth
    at, total, rows = np.empty_like(entries), 0, []
    for one in np.unique(kind).tolist():
        width, column = (one, nth) if joint else (1, np.zeros_like(nth))
        for wanted, in_place in _pieces(np.unique(entries[kind == one])):
            first, last = int(wanted[0]), int(wanted[-1]) + 1
            mine = (kind == one) & (entries >= first) & (entries < last)
            row = entries[mine] - first if in_place else np.searchsorted(wanted, entries[mine])
            owner = np.zeros((last - first if in_place else len(wanted), width), np.int64)
            owner[row, column[mine]] = owners[mine]
            at[mine] = total + row * width + column[mine]
            total += owner.size
            gather = None if in_place else torch.from_numpy(wanted).to(device, non_blocking=True)
            owner_RM = torch.from_numpy(owner).to(device, non_blocking=True)
            rows.append(Rows(first=first, last=last, gather_R=gather, owner_RM=owner_RM))
    return tuple(rows), at


def _pieces(blocks: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Sorted blocks cut at their widest gaps into ranges to be read in place; in one piece where that wastes much."""
    gaps = np.diff(blocks) - 1
    cuts = np.argsort(-gaps, kind="stable")[: RANGES - 1]
    cuts = cuts[gaps[cuts] >= GAP]
    if blocks[-1] - blocks[0] + 1 - gaps[cuts].sum() > WASTE * len(blocks):
        return [(blocks, False)]
    return [(piece, True) for piece in np.split(blocks, np.sort(cuts) + 1)]


def attend_decode(q_BHD: Tensor, keys_PHSD: Tensor, values_PHSD: Tensor, d: Decode, scale: float) -> Tensor:
    """Shapes: -> [B, H * D]."""
    num, heads, width = q_BHD.shape
    size = keys_PHSD.shape[2]
    s_RHS = _joined([_scores(q_BHD, r.of(keys_PHSD), r.owner_RM, scale) for r in d.rows])
    s_BHNS = s_RHS.index_select(0, d.table_BN).view(num, -1, heads, size).transpose(1, 2).float()
    s_BHNS = s_BHNS.masked_fill(d.masked_B1NS, -torch.inf)
    p_BHNS = s_BHNS.flatten(2).softmax(-1).view(s_BHNS.shape).to(q_BHD.dtype)
    p_QHS = p_BHNS.transpose(1, 2).reshape(-1, heads, size).index_select(0, d.entry_slot_Q)
    p_RHS = p_QHS.new_zeros(s_RHS.shape).index_copy_(0, d.entry_row_Q, p_QHS)
    parts = torch.split(p_RHS, [r.owner_RM.numel() for r in d.rows])
    o_RX = _joined([_weighted(p, r.of(values_PHSD)) for p, r in zip(parts, d.rows, strict=True)])
    o_QX = o_RX.index_select(0, d.entry_row_Q).float()
    out = torch.zeros(num, heads * width, dtype=torch.float32, device=q_BHD.device)
    return out.index_add_(0, d.entry_owner_Q, o_QX).to(q_BHD.dtype)


def _scores(q_BHD: Tensor, k_RHSD: Tensor, owner_RM: Tensor, scale: float) -> Tensor:
    """Each block's keys with the queries of its owners. Shapes: -> [R * M, H, S]."""
    rows, heads, size, width = k_RHSD.shape
    q_RHMD = q_BHD.index_select(0, owner_RM.flatten()).view(rows, -1, heads, width).transpose(1, 2)
    q, k = q_RHMD.reshape(rows * heads, -1, width), k_RHSD.view(rows * heads, size, width).transpose(1, 2)
    s_RHMS = torch.baddbmm(q.new_empty(1, 1, 1), q, k, beta=0, alpha=scale).view(rows, heads, -1, size)
    return s_RHMS.transpose(1, 2).reshape(-1, heads, size)


def _weighted(p_RHS: Tensor, v_RHSD: Tensor) -> Tensor:
    """Each block's values, weighted for each of its owners. Shapes: [R * M, H, S] -> [R * M, H * D]."""
    rows, heads, size, width = v_RHSD.shape
    p = p_RHS.view(rows, -1, heads, size).transpose(1, 2).reshape(rows * heads, -1, size)
    o_RHMD = torch.bmm(p, v_RHSD.view(rows * heads, size, width)).view(rows, heads, -1, width)
    return o_RHMD.transpose(1, 2).reshape(-1, heads * width)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
