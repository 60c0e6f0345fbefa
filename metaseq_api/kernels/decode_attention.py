"""Attention of one new token per sequence over its blocks of the cache, in Triton: flash-decoding.

Each program takes one sequence, one head and one part of the context, and keeps a running softmax over it; where the
context is cut into several parts a second kernel joins them. The new token's key and value come straight from the
projection: the first part's program writes them into the cache and starts with them, so that nobody reads what is being
written. A sequence of no tokens (a row that pads a batch) reads and writes nothing, and gives zeros.

Knows the cache's layout. Does not know batches. What it must give is `reference.decode_attention`.

Shapes: as in `reference`; W head width, up to the next power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PROGRAMS = 512
"""Contexts are cut until about so many programs run: a few for each multiprocessor of a large GPU."""
MOST_SPLITS = 16
TILE_BYTES = 16384
"""Of a tile of keys, tokens times head width, that a program holds at once, and as much of values."""


# a step's integers lie at any address and tables are of any width: none of that shall compile another kernel
@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["table_width"], do_not_specialize_on_alignment=["rows_ptr", "tables_ptr", "contexts_ptr"]
)
def _attend_part(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    contexts_ptr,
    out_ptr,
    parts_ptr,
    stats_ptr,
    q_stride,
    k_stride,
    v_stride,
    table_width,
    heads,
    scale,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    b, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + b).to(tl.int64)
    context = tl.load(contexts_ptr + b)
    past = context - 1  # what the cache holds already
    each = tl.cdiv(tl.cdiv(past, SPLITS), TILE) * TILE
    begin = split * each
    end = tl.minimum(begin + each, past)
    d = tl.arange(0, W)
    q_W = tl.load(q_ptr + row * q_stride + h * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32) * scale

    new = (split == 0) & (context > 0)
    mine = d < tl.where(new, WIDTH, 0)
    k_W = tl.load(k_ptr + row * k_stride + h * WIDTH + d, mask=mine, other=0.0)
    v_W = tl.load(v_ptr + row * v_stride + h * WIDTH + d, mask=mine, other=0.0)
    block = tl.load(tables_ptr + b * table_width + tl.maximum(past, 0) // SIZE).to(tl.int64)
    at = ((block * heads + h) * SIZE + past % SIZE) * WIDTH + d
    tl.store(keys_ptr + at, k_W, mask=mine)
    tl.store(values_ptr + at, v_W, mask=mine)
    most = tl.where(new, tl.sum(q_W * k_W.to(tl.float32), 0), float("-inf"))
    total = tl.where(new, 1.0, 0.0)
    sum_W = v_W.to(tl.float32)

    for start in range(begin, end, TILE):
        n = start + tl.arange(0, TILE)
        here = n < end
        block_N = tl.load(tables_ptr + b * table_width + n // SIZE, mask=here, other=0).to(tl.int64)
        inside_NW = ((h * SIZE + n % SIZE) * WIDTH)[:, None] + d[None, :]  # its block, in 32 bits
        at_NW = block_N[:, None] * (heads * SIZE * WIDTH) + inside_NW
        real = here[:, None] & (d < WIDTH)[None, :]
        k_NW = tl.load(keys_ptr + at_NW, mask=real, other=0.0).to(tl.float32)
        v_NW = tl.load(values_ptr + at_NW, mask=real, other=0.0).to(tl.float32)
        s_N = tl.where(here, tl.sum(q_W[None, :] * k_NW, 1), float("-inf"))
        higher = tl.maximum(most, tl.max(s_N, 0))
        p_N = tl.exp(s_N - higher)
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(p_N, 0)
        sum_W = sum_W * shrink + tl.sum(p_N[:, None] * v_NW, 0)
        most = higher

    if SPLITS == 1:
        out_W = sum_W / tl.where(total > 0, total, 1.0)
        tl.store(out_ptr + (row * heads + h) * WIDTH + d, out_W.to(out_ptr.dtype.element_ty), mask=d < WIDTH)
    else:
        part = (b * heads + h) * SPLITS + split
        tl.store(parts_ptr + part * W + d, sum_W)
        tl.store(stats_ptr + 2 * part, most)
        tl.store(stats_ptr + 2 * part + 1, total)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])  # type: ignore[untyped-decorator, unused-ignore]
def _join_parts(  # type: ignore[no-untyped-def]
    rows_ptr,
    parts_ptr,
    stats_ptr,
    out_ptr,
    heads,
    WIDTH: tl.constexpr,
    W: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    b, h = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + b).to(tl.int64)
    d, part_S = tl.arange(0, W), (b * heads + h) * SPLITS + tl.arange(0, SPLITS)
    most_S, total_S = tl.load(stats_ptr + 2 * part_S), tl.load(stats_ptr + 2 * part_S + 1)
    most = tl.max(most_S, 0)
    # a part without tokens has a most of -inf and weighs nothing; so has every part of a sequence without tokens
    weight_S = tl.exp(most_S - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight_S * total_S, 0)
    sum_SW = tl.load(parts_ptr + part_S[:, None] * W + d[None, :])
    out_W = tl.sum(weight_S[:, None] * sum_SW, 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + (row * heads + h) * WIDTH + d, out_W.to(out_ptr.dtype.element_ty), mask=d < WIDTH)


def num_splits(num_sequences: int, num_heads: int) -> int:
    """Into how many parts contexts are cut: a power of two, the fewer the more sequences there are."""
    wanted = max(1, PROGRAMS // (num_sequences * num_heads))
    return int(min(MOST_SPLITS, 1 << (wanted.bit_length() - 1)))


def decode_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    keys_PHSD: Tensor,
    values_PHSD: Tensor,
    *,
    rows_B: Tensor,
    tables_BN: Tensor,
    contexts_B: Tensor,
    scale: float,
    out_TX: Tensor,
    splits: int | None = None,
    early: bool = False,
) -> None:
    """What `reference.decode_attention` does, in one or two launches and without waiting for the GPU.

    early: each may start before the kernel before it has ended, which it then waits for.
    """
    num, width = len(rows_B), q_THD.shape[2]
    heads, size = keys_PHSD.shape[1], keys_PHSD.shape[2]
    for x in (q_THD, k_THD, v_THD):
        assert x.stride(2) == 1, x.stride()
        assert x.stride(1) == width, x.stride()
    assert keys_PHSD.is_contiguous()
    assert values_PHSD.is_contiguous()
    assert out_TX.is_contiguous()
    assert tables_BN.is_contiguous()
    splits = splits or num_splits(num, heads)
    padded = triton.next_power_of_2(width)
    # one part needs no room; the kernel then never touches these
    parts = out_TX if splits == 1 else q_THD.new_empty(num * heads * splits * padded, dtype=torch.float32)
    stats = out_TX if splits == 1 else q_THD.new_empty(num * heads * splits * 2, dtype=torch.float32)
    constants: dict[str, Any] = {"WIDTH": width, "W": padded, "SPLITS": splits, "EARLY": early}
    constants |= {"launch_pdl": True} if early else {}
    _attend_part[(num, heads, splits)](
        q_THD,
        k_THD,
        v_THD,
        rows_B,
        keys_PHSD,
        values_PHSD,
        tables_BN,
        contexts_B,
        out_TX,
        parts,
        stats,
        q_THD.stride(0),
        k_THD.stride(0),
        v_THD.stride(0),
        tables_BN.shape[1],
        heads,
        scale,
        SIZE=size,
        TILE=max(16, TILE_BYTES // (padded * q_THD.itemsize)),
        **constants,
    )
    if splits > 1:
        _join_parts[(num, heads)](rows_B, parts, stats, out_TX, heads, **constants)
