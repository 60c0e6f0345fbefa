"""Drive a model by hand, one Batch after another, as the engine would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaseq_api.core import Batch, BatchItem, ModelConfig
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT, Weights
from metaseq_api.model.paths import plan
from metaseq_api.parallel.context import ParallelContext


class Driver:
    """A loaded model with a small cache, on one rank."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        context: ParallelContext | None = None,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 32,
        block_size: int = 8,
    ) -> None:
        self.context = context or ParallelContext()
        self.model = OPT(config, self.context, dtype)
        self.model.load(weights)
        self.cache = KVCache(config, self.context, dtype, num_blocks=num_blocks, block_size=block_size)

    def step(
        self,
        *items: tuple[list[int], int, list[int]],
        prompts: Sequence[int] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Feed (all tokens so far, how many the cache holds, blocks) of each sequence; logits of every fed token.

        `prompts`: how long the prompt of each is; where it is not said, a token fed by itself counts as generated.
        `wanted`: of how many of each one's last tokens logits are.
        """
        if prompts is None:
            prompts = [cached if len(tokens) - cached == 1 else len(tokens) for tokens, cached, _ in items]
        if wanted is None:
            wanted = [len(tokens) - cached for tokens, cached, _ in items]
        batch = Batch(
            items=tuple(
                BatchItem(
                    start=cached,
                    token_ids=tuple(tokens[cached:]),
                    block_ids=tuple(blocks[: -(-len(tokens) // self.cache.block_size)]),
                    num_logits=num_logits,
                    num_prompt=min(max(prompt - cached, 0), len(tokens) - cached),
                )
                for (tokens, cached, blocks), prompt, num_logits in zip(items, prompts, wanted, strict=True)
            )
        )
        with torch.inference_mode():
            planned = plan(Batch.unpack(batch.words), self.cache, self.context.device, None)
            out = self.model.logits(self.model(planned, self.cache))
        return [] if out is None else list(out.split([i.num_logits for i in batch.items]))
