"""A CPU cache's pages are there before they are needed, and no more of them than that."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys

import numpy as np
import pytest
import torch
from support.processes import until

from metaseq_api.model import pages
from metaseq_api.model.pages import Pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")

BLOCK = 64 << 10  # bytes
BLOCKS = 1024


def pool() -> torch.Tensor:
    return torch.from_numpy(np.zeros((BLOCKS, BLOCK), np.uint8))


def there(pool: torch.Tensor, block: int) -> bool:
    """Whether the page in the middle of a block is."""
    found = (ctypes.c_ubyte * 1)()
    address = (pool[block].data_ptr() + BLOCK // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), found) == 0
    return bool(found[0] & 1)


def test_the_first_blocks_of_every_pool_are_there_at_once_and_the_last_ones_are_not() -> None:
    pools = [pool() for _ in range(3)]
    assert not there(pools[0], 0)
    Pages(pools, ahead=128)
    until(lambda: all(there(p, b) for p in pools for b in range(128)), "128 blocks of each", 10)
    assert not any(there(p, b) for p in pools for b in range(256, BLOCKS))


def test_they_stay_ahead_of_the_highest_block_in_use_and_end_with_the_pool() -> None:
    own = pool()
    ahead = Pages([own], ahead=128)
    until(lambda: there(own, 127), "the first", 10)
    ahead.reach(10)
    assert not there(own, 256), "half of what was taken ahead is still there"
    own[500] = 7
    for block in (100, 400, BLOCKS - 1):
        ahead.reach(block)
        until(lambda: all(there(own, b) for b in range(min(block + 128, BLOCKS))), f"those after {block}", 10)  # noqa: B023
    assert own[500].eq(7).all()
    assert own.count_nonzero() == BLOCK, "what was in them is kept"


def test_where_the_kernel_cannot_it_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: int, size: int) -> None:
        asked.append(address)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(pages, "_populate", refuse)
    ahead = Pages([pool(), pool()], ahead=128)
    until(lambda: bool(asked), "the question", 10)
    ahead.reach(BLOCKS - 1)
    assert len(asked) == 1
