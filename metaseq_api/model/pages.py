"""Pages of a CPU's cache, taken before a step has to wait for them.

The kernel finds and clears a page when it is first written, and on a virtual machine so does its host: a prompt of 1024
tokens waited 37 of 202 ms for that (OPT-125M, bf16, 2026-11-29). A thread that runs when a core has nothing else to do
stays ahead of the highest block in use.

Knows addresses and the order in which blocks are given away. Does not know whose they are, or what is in them.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence

from torch import Tensor

log = logging.getLogger(__name__)

LARGE = 2 << 20
"""Bytes of a large page; of each pool so much is asked for at once."""
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


class Pages:
    """Those of pools [P, ...], each with a part of every block; up to `ahead` blocks beyond the highest one in use."""

    def __init__(self, pools: Sequence[Tensor], ahead: int) -> None:
        self._pools = pools
        self._num, self._ahead = len(pools[0]), ahead
        self._taken = 0  # blocks
        self._taking: threading.Thread | None = None
        self._may = sys.platform == "linux" and pools[0].device.type == "cpu"
        self.reach(-1)

    def reach(self, block: int) -> None:
        """A block is in use, and with it all below; go on taking once half of what was taken ahead is."""
        if self._taken >= min(block + 1 + self._ahead // 2, self._num) or not self._may:
            return
        if self._taking is None or not self._taking.is_alive():
            first, self._taken = self._taken, min(block + 1 + self._ahead, self._num)
            self._taking = threading.Thread(target=self._take, args=(first, self._taken), daemon=True, name="pages")
            self._taking.start()  # it holds the pools while it runs, no longer

    def _take(self, first: int, last: int) -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # this thread's alone
            for address, size in self._stretches(first, last):
                _populate(address, size)
        except OSError as e:
            self._may = False
            log.debug("pages of the cache are taken when they are first written: %s", e.strerror)

    def _stretches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Addresses and sizes, the lowest blocks of all pools first."""
        each = self._pools[0][0].nbytes
        step = -(-LARGE // each)
        for begin in range(first, last, step):
            for pool in self._pools:
                start = -(-(pool.data_ptr() + begin * each) // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (pool.data_ptr() + min(begin + step, last) * each) // mmap.PAGESIZE * mmap.PAGESIZE
                if start < end:
                    yield start, end - start


def _populate(address: int, size: int) -> None:
    """Have these pages there, with what is in them. Raises: OSError where the kernel cannot."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    while madvise(address, size, _POPULATE_WRITE):
        why = ctypes.get_errno()
        if why not in (errno.EINTR, errno.EAGAIN):
            raise OSError(why, os.strerror(why))
