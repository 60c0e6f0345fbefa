"""One rank's keys and values, in blocks. Knows their layout and how to write them; not which block is whose.

Shapes: P blocks of the pool, H this rank's heads, S tokens of a block, D head width, T tokens of the step.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.parallel.context import ParallelContext


class KVCache:
    """Keys and values of every layer as [P, H, S, D]: a block's tokens lie together for each head, so that a matrix
    product over blocks reads them in place."""

    def __init__(
        self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, *, num_blocks: int, block_size: int
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_heads = config.num_heads // context.tensor_size
        shape = (num_blocks, self.num_heads, block_size, config.head_dim)
        self.keys = [_zeros(shape, dtype, context.device) for _ in range(config.num_layers)]
        self.values = [_zeros(shape, dtype, context.device) for _ in range(config.num_layers)]

    @staticmethod
    def bytes_per_block(config: ModelConfig, tensor_size: int, dtype: torch.dtype, block_size: int) -> int:
        return 2 * config.num_layers * config.hidden_dim // tensor_size * block_size * dtype.itemsize

    def rows(self, blocks_T: Tensor, offsets_T: Tensor) -> Tensor:
        """Where a step's tokens are written: rows of [P * H * S, D], as [T * H]."""
        heads = torch.arange(self.num_heads, device=blocks_T.device)
        at = (blocks_T[:, None] * self.num_heads + heads) * self.block_size + offsets_T[:, None]
        return at.flatten()

    def write(self, layer: int, rows: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
        """Put a step's keys and values at `rows`."""
        head_dim = k_THD.shape[-1]
        self.keys[layer].view(-1, head_dim).index_copy_(0, rows, k_THD.reshape(-1, head_dim))
        self.values[layer].view(-1, head_dim).index_copy_(0, rows, v_THD.reshape(-1, head_dim))

    def clear(self, blocks: Tensor) -> None:
        """Wipe the values of blocks that change hands half filled: a former owner's NaN must not outlive it."""
        for values in self.values:
            values.index_fill_(0, blocks, 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since unwritten slots are multiplied by a weight of zero and must not hold NaN.

    On a CPU the pages are the kernel's zeros, taken when first written: torch.zeros would touch them all (4 GiB took
    10 s at start-up, 2026-11-20).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
