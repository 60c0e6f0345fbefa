"""Which blocks of the KV cache are free, how many sequences hold the others, and what is still in them. Integers and
keys only; the tensors are the Worker's. Does not know sequences.

A full block may be given a key, which says all that its content depends on: the tokens in it, every token before them,
and which of these were generated (a rank computes those in another way, which rounds differently). It is then found by
whoever comes with the same, for as long as it has not been needed for something else, also when nobody holds it any
more: blocks of a prompt by every prompt, generated ones by the sequence itself once it was preempted. A chat's next
turn computes the last answer once more, as part of its prompt. Rules:
1. a block that somebody holds is never given away;
2. blocks without a key that nobody holds go first, the lowest of them first, so that blocks in use stay close together
   (attention multiplies a range of them);
3. then found ones that nobody holds, least recently used first, and no block before those that continue it. That holds
   by itself, since whoever holds a block holds all before it, and `free` lets go of the last first.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def block_key(parent: bytes, token_ids: Sequence[int], num_prompt: int) -> bytes:
    """The key of a full block behind the one whose key is `parent` (b"" for the first); the first `num_prompt` of its
    tokens are a prompt's.

    A cryptographic digest: two contents with one key can't be made, let alone met by chance.
    """
    return hashlib.blake2b(parent + array("i", [num_prompt, *token_ids]).tobytes(), digest_size=32).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, counted by reference: a prompt's blocks may have several holders."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()  # have a key and no holder, least recently used first
        self._holders = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with a key included."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can still be found."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num: int) -> list[int]:
        """Take `num` blocks, which must be free."""
        assert num <= self.num_free, (num, self.num_free)
        taken = [heapq.heappop(self._free) if self._free else self._evict() for _ in range(num)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Become one more holder of blocks that somebody holds or that were found."""
        for block in blocks:
            assert self._holders[block] > 0 or block in self._idle, block
            self._idle.pop(block, None)
            self._holders[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of one sequence's blocks, given in its order; the last holder makes them free."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, block
            self._holders[block] -= 1
            if self._holders[block] == 0 and block in self._keys:
                self._idle[block] = None
            elif self._holders[block] == 0:
                heapq.heappush(self._free, block)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of `keys`, from the first, that the cache has. Nobody holds them by that."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_beside(self, found: Sequence[int]) -> int:
        """How many blocks would be free if the found ones were shared."""
        return self.num_free - sum(block in self._idle for block in found)

    def keep(self, block: int, key: bytes) -> int:
        """Make a full block that one holds findable; the block to go on with, which may be a twin computed before."""
        twin = self._blocks.setdefault(key, block)
        if twin == block:
            assert self._holders[block] > 0, block
            assert self._keys.setdefault(block, key) == key, block
        else:
            self.share([twin])
            self.free([block])
        return twin

    def forget(self, keys: Sequence[bytes]) -> None:
        """Let nobody find these any more; whoever holds them keeps them."""
        for key in keys:
            block = self._blocks.pop(key, None)
            if block is not None:
                del self._keys[block]
                if block in self._idle:
                    del self._idle[block]
                    heapq.heappush(self._free, block)

    def check_idle(self) -> None:
        """Assert what must hold when no sequence lives: every block is free or can be found, once."""
        assert not any(self._holders), [b for b, n in enumerate(self._holders) if n]
        assert sorted([*self._free, *self._idle]) == list(range(self.num_blocks))
        assert self._keys.keys() == self._idle.keys()
        assert self._blocks == {key: block for block, key in self._keys.items()}

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._blocks[self._keys.pop(block)]
        return block
