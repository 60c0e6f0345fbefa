"""One file whose bytes are mapped, never read as a whole. Does not know what is in it.

Each view maps the pages of what was asked for and lets go of them, and of the file, when it is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from metaseq_api.errors import CheckpointCorrupt, CheckpointNotFound

PIECE, READERS = 4 << 20, 4
"""What is read at once, in bytes, and by how many threads of a process."""
REMEDY = "fetch or write the file again"
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def read_at(file: int, data: memoryview, at: int) -> bool:
    """Fill `data` with the bytes from `at` on, many of them by several threads; whether there were so many.

    A disk gives more where more is asked of it at once, and fresh memory is taken, and filled, by one core each.
    """
    if len(data) <= PIECE:
        return _read_piece(file, data, at)
    begins = range(0, len(data), PIECE)
    return all(_readers().map(lambda begin: _read_piece(file, data[begin : begin + PIECE], at + begin), begins))


def _read_piece(file: int, data: memoryview, at: int) -> bool:
    while data:
        done = os.preadv(file, [data], at)
        if not done:
            return False
        data, at = data[done:], at + done
    return True


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "reader")


class MappedFile:
    """A file that is not to change while it is read.

    Raises: CheckpointNotFound, CheckpointCorrupt, both naming the file; so do all methods.
    """

    size = 0
    """Units: bytes, as it was when it was first opened."""
    _identity: tuple[int, ...] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.opened():
            pass

    @contextlib.contextmanager
    def opened(self, buffering: int = -1, *, writing: bool = False) -> Iterator[IO[bytes]]:
        """The file, which must be the one that it was at first, unless the caller is writing it meanwhile."""
        try:
            with self.path.open("rb", buffering) as file:
                stat = os.fstat(file.fileno())
                identity = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
                if self._identity not in (None, identity) and not writing:
                    raise self.changed()
                if self._identity is None:
                    self._identity, self.size = identity, stat.st_size
                yield file
        except FileNotFoundError:
            raise CheckpointNotFound(f"{self.path} does not exist; put it back, or name another checkpoint") from None
        except OSError as error:
            raise CheckpointNotFound(
                f"{self.path} cannot be read ({error.strerror}); make it a readable file"
            ) from None

    def corrupt(self, what: str, remedy: str = REMEDY) -> CheckpointCorrupt:
        """Make the error that says what is wrong with this file."""
        return CheckpointCorrupt(f"{self.path} {what}; {remedy}")

    def changed(self) -> CheckpointCorrupt:
        """Make the error that says so."""
        return self.corrupt("was changed while it was being read", "start again")

    def read(self, start: int, length: int) -> bytes:
        """Read bytes that the caller knows to be few."""
        with self.opened() as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise self.corrupt(f"is cut off: it has {self.size} bytes, and {start + length} are wanted")
        return data

    def numbers(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Map `count` numbers from byte `start` on; to be copied from, not written to. Shapes: a vector."""
        length = count * dtype.itemsize
        if start < 0 or count < 0 or start + length > self.size:
            raise self.corrupt(f"is cut off: it has {self.size} bytes, and {start + length} are wanted")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        base = start - start % mmap.ALLOCATIONGRANULARITY
        with self.opened() as file:
            # Private and writable, though never written to: torch warns about read-only buffers.
            window = mmap.mmap(
                file.fileno(),
                start - base + length,
                flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=base,
            )
        if start % dtype.itemsize:
            return torch.frombuffer(window, dtype=torch.uint8, count=length, offset=start - base).clone().view(dtype)
        return torch.frombuffer(window, dtype=dtype, count=count, offset=start - base)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose rows follow one another."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
