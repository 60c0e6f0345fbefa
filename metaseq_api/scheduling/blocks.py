"""Which blocks of the KV cache are free, and how many sequences hold the others. Integers only; the tensors are the
Worker's. Does not know sequences."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, counted by reference: a prompt's blocks may have several holders.

    The lowest free block goes first, so that blocks in use stay close together (attention multiplies a range of them).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num: int) -> list[int]:
        """Take `num` blocks, which must be free."""
        assert num <= len(self._free), (num, len(self._free))
        taken = [heapq.heappop(self._free) for _ in range(num)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more holder of blocks that somebody holds."""
        for block in blocks:
            assert self._holders[block] > 0, block
            self._holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of blocks; the last holder makes them free."""
        for block in blocks:
            assert self._holders[block] > 0, block
            self._holders[block] -= 1
            if self._holders[block] == 0:
                heapq.heappush(self._free, block)

    def check_idle(self) -> None:
        """Assert what must hold when no sequence lives: every block is free, once."""
        assert not any(self._holders), [b for b, n in enumerate(self._holders) if n]
        assert sorted(self._free) == list(range(self.num_blocks))
