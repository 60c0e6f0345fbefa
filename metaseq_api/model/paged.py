"""A step as a GPU runs it: all single tokens by one kernel over block tables, each longer piece of a prompt by torch's
FlashAttention.

What the kernel reads are a few integers per sequence, so that a step costs one copy to the GPU, and one of single
tokens alone has a shape that depends on the number of sequences and on nothing else (`decode_step` captures that).

Knows the Batch and the cache's layout. Does not know the model, or when this way is taken (that is `paths`).

Shapes: T tokens of the step, B single-token sequences, N blocks of a table, H heads of this rank, D head width,
C context of one prompt, X = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaseq_api.core import Batch, BatchItem
from metaseq_api.kernels.reference import Kernels
from metaseq_api.model.cache import KVCache
from metaseq_api.parallel.transfer import put


@dataclass(frozen=True, slots=True, kw_only=True)
class Singles:
    """Rows of the step that feed one token of a sequence each."""

    rows_B: Tensor
    tables_BN: Tensor
    contexts_B: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [begin, end) of the step: a prompt's tokens from `start` on. `blocks` hold all of its context."""

    begin: int
    end: int
    start: int
    blocks: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPlan:
    """A Batch as tensors on the GPU."""

    kernels: Kernels
    token_ids_T: Tensor
    positions_T: Tensor
    logit_rows: Tensor
    singles: Singles | None
    pieces: tuple[Piece, ...] = ()
    blocks_T: Tensor | None = None
    offsets_T: Tensor | None = None
    """Where every token's key and value go; not needed where all are single, whose kernel writes them."""
    half_filled: None = None
    """Nothing is wiped: what lies beyond a context is never read."""


def plan_paged(batch: Batch, cache: KVCache, device: torch.device, kernels: Kernels) -> PagedPlan:
    """Work out, once for all layers, what each token reads and where its keys and values go; one copy to the device."""
    size, items = cache.block_size, batch.items
    ends = np.cumsum([i.num_tokens for i in items])
    singles = [(int(end) - 1, i) for end, i in zip(ends, items, strict=True) if i.num_tokens == 1]
    longer = [(int(end), i) for end, i in zip(ends, items, strict=True) if i.num_tokens > 1]
    positions = np.concatenate([np.arange(i.start, i.context_len) for i in items])
    parts = {
        "tokens": np.fromiter((t for i in items for t in i.token_ids), np.int64, batch.num_tokens),
        "positions": positions,
        "logits": np.concatenate([np.arange(e - i.num_logits, e) for i, e in zip(items, ends, strict=True)]),
        "rows": np.array([row for row, _ in singles], np.int64),
        "contexts": np.array([i.context_len for _, i in singles], np.int64),
        "tables": tables([i for _, i in singles], max((len(i.block_ids) for _, i in singles), default=0)).ravel(),
    }
    if longer:
        parts["blocks"] = np.concatenate(
            [np.asarray(i.block_ids)[np.arange(i.start, i.context_len) // size] for i in items]
        )
        parts["offsets"] = positions % size
        parts["pieces"] = np.concatenate([np.asarray(i.block_ids) for _, i in longer])
    lengths = [len(p) for p in parts.values()]
    words = put(np.concatenate(list(parts.values())).astype(np.int32), device)
    on = dict(zip(parts, torch.split(words, lengths), strict=True))
    blocks = torch.split(on["pieces"], [len(i.block_ids) for _, i in longer]) if longer else ()
    return PagedPlan(
        kernels=kernels,
        token_ids_T=on["tokens"],
        positions_T=on["positions"],
        logit_rows=on["logits"],
        singles=Singles(rows_B=on["rows"], contexts_B=on["contexts"], tables_BN=on["tables"].view(len(singles), -1))
        if singles
        else None,
        pieces=tuple(
            Piece(begin=end - i.num_tokens, end=end, start=i.start, blocks=b)
            for (end, i), b in zip(longer, blocks, strict=True)
        ),
        blocks_T=on.get("blocks"),
        offsets_T=on.get("offsets"),
    )


def tables(items: list[BatchItem], width: int) -> np.ndarray:
    """The items' blocks side by side, each row filled up with zeros. Shapes: -> [B, width]."""
    out = np.zeros((len(items), width), np.int32)
    for row, item in zip(out, items, strict=True):
        row[: len(item.block_ids)] = item.block_ids
    return out


def attend_paged(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *, layer: int, plan: PagedPlan, cache: KVCache, scale: float
) -> Tensor:
    """Write the step's keys and values, and attend. Shapes: [T, H, D] each -> [T, X]."""
    keys, values = cache.keys[layer], cache.values[layer]
    out_TX = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1] * q_THD.shape[2])
    if plan.blocks_T is not None:
        keys[plan.blocks_T, :, plan.offsets_T], values[plan.blocks_T, :, plan.offsets_T] = k_THD, v_THD
    for piece in plan.pieces:
        out_TX[piece.begin : piece.end] = _attend_piece(q_THD, k_THD, v_THD, piece, keys, values, scale)
    if plan.singles is not None:
        plan.kernels.decode_attention(
            q_THD,
            k_THD,
            v_THD,
            keys,
            values,
            rows_B=plan.singles.rows_B,
            tables_BN=plan.singles.tables_BN,
            contexts_B=plan.singles.contexts_B,
            scale=scale,
            out_TX=out_TX,
        )
    return out_TX


def _attend_piece(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, piece: Piece, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    q, k, v = (x[piece.begin : piece.end].transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    if piece.start == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        from torch.nn.attention.bias import causal_lower_right  # takes seconds, of which a CPU's start-up needs none

        num, context = piece.end - piece.begin, piece.start + piece.end - piece.begin
        k, v = (x[piece.blocks].transpose(0, 1).flatten(1, 2)[None, :, :context] for x in (keys, values))
        # the last token sees all: FlashAttention has that triangle too, without a mask of num x context
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(num, context), scale=scale)
    return out[0].transpose(0, 1).flatten(1)
