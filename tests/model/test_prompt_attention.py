"""Kernels of our own attend as the formula says, over long prompts, in chunks, at every width of a head."""

from __future__ import annotations

import pytest
import torch
from support.own_kernels import needs_own

from metaseq_api.core import Batch, BatchItem, ModelConfig
from metaseq_api.kernels.native import native
from metaseq_api.model.cache import KVCache
from metaseq_api.model.native import attend_native, plan_native
from metaseq_api.parallel.context import ParallelContext

HEADS, SIZE = 2, 16
pytestmark = needs_own


def cache_of(width: int, dtype: torch.dtype) -> KVCache:
    config = ModelConfig(
        num_layers=1,
        hidden_dim=HEADS * width,
        num_heads=HEADS,
        ffn_dim=8,
        vocab_size=8,
        max_positions=1024,
        embed_dim=HEADS * width,
        pre_norm=True,
        final_norm=True,
        activation="relu",
        dtype="fp32",
    )
    return KVCache(config, ParallelContext(), dtype, num_blocks=80, block_size=SIZE)


def item(start: int, num: int, first_block: int) -> BatchItem:
    blocks = tuple(first_block + i for i in range(-(-(start + num) // SIZE)))
    return BatchItem(start=start, token_ids=(5,) * num, block_ids=blocks, num_logits=0, num_prompt=num)


def attended(qkv: list[torch.Tensor], scale: float) -> torch.Tensor:
    """The formula, in fp64. Shapes: three of [C, H, D] -> [C, H * D]."""
    q, k, v = (x.double().transpose(0, 1) for x in qkv)
    later = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    weights = (q @ k.transpose(1, 2) * scale).masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 64, 80, 128])
def test_prompts_of_any_length_and_cut_attend_as_the_formula_says(width: int, dtype: torch.dtype) -> None:
    kernels = native()
    assert kernels is not None
    cache, scale = cache_of(width, dtype), width**-0.5
    lengths, firsts = (700, 37, 129), (0, 50, 60)
    given = [[torch.randn(n, HEADS, width).to(dtype) for _ in "qkv"] for n in lengths]
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    for ends in ((333, 0, 36), (334, 37, 129), (700, 37, 129)):  # how far each is after a step
        starts = [sum(map(len, f)) for f in found]
        items = [(i, start, end) for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
        rows = [[g[starts[i] : end] for g in given[i]] for i, _, end in items]
        batch = Batch(items=tuple(item(start, end - start, firsts[i]) for i, start, end in items))
        plan = plan_native(batch, cache, kernels)
        q, k, v = torch.stack([torch.cat([r[n] for r in rows]) for n in range(3)], 1).unbind(1)
        out = attend_native(q, k, v, layer=0, plan=plan, cache=cache, scale=scale)
        for (i, start, end), part in zip(items, out.split([e - s for _, s, e in items]), strict=True):
            assert len(part) == end - start
            found[i].append(part)
    for parts, qkv, length in zip(found, given, lengths, strict=True):
        got = torch.cat(parts)
        assert len(got) == length
        close = 2e-6 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), attended(qkv, scale), atol=close, rtol=close)
