"""Writes a file that torch.load reads, tensor by tensor, under its own name only when it is whole.

torch.save lays out an empty file of the right size; each tensor's numbers then go straight to their place. So memory
holds no more than one chunk, and an interrupted run leaves a name that ends in ".partial", which the next run takes
over. The zip format's checksums are filled in last, so that `unzip -t` finds the file whole. Does not know metaseq.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from metaseq_api.checkpoint import crc
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.unpickle import StoredTensor
from metaseq_api.errors import ResourceError
from metaseq_api.progress import Progress

CHUNK = 64 << 20
"""Units: bytes written between two signs of progress."""
FLUSH_S = 0.3
"""Units: seconds between two times that the disk is told to write what it was given."""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A tensor to be written: `chunks` gives its numbers in order, as vectors of `dtype`.

    The same Stream in two places is stored once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterable[Tensor]]

    @staticmethod
    def of(tensor: Tensor) -> Stream:
        """Write a tensor that is in memory."""
        return Stream(tuple(tensor.shape), tensor.dtype, lambda: [tensor.reshape(-1)])

    @property
    def num_bytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


def streams(tree: Any) -> list[Stream]:
    """List the Streams in nested dicts, lists and tuples, each once."""
    if isinstance(tree, Stream):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return list(dict.fromkeys(stream for item in inner for stream in streams(item)))


def save(tree: Any, path: Path, progress: Progress = lambda num_bytes: None) -> None:
    """Write nested dicts, lists and tuples of plain data and Streams to `path`.

    Raises: ResourceError where the disk is full, the path unusable, or another process writes the same file.
    """
    with finished(path, sum(s.num_bytes for s in streams(tree))) as (file, partial):
        with skip_data():
            torch.save(_skeleton(tree, {}), partial)
        archive, sums = Archive(partial), {}
        with ThreadPoolExecutor(1) as beside:
            for stream, stored in dict(_places(tree, archive.tree)).items():
                place = archive.place(stored, writing=True)
                checksum = _fill(file, place, stream, progress, beside)
                sums[archive.check(stored)] = place + stream.num_bytes, checksum
        crc.fill_in(file, sums)


@contextlib.contextmanager
def finished(path: Path, num_bytes: int) -> Iterator[tuple[int, Path]]:
    """Give an open file and its temporary name; the file gets the name `path` when all went well, else it is removed.

    Raises: ResourceError where the disk has not `num_bytes` free, or for any OSError within.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, free = path.with_name(f"{path.name}.partial"), shutil.disk_usage(path.parent).free
        if num_bytes > free:
            raise ResourceError(
                f"{path} needs {num_bytes} bytes, and {path.parent} has {free} free; make room or go elsewhere"
            )
        with _locked(partial) as file:
            try:
                with _flushed(file):
                    yield file, partial
                os.fsync(file)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full while writing {path}; make room and run this again") from None
        raise ResourceError(f"{path} cannot be written ({error.strerror or error}); name another place") from None


@contextlib.contextmanager
def _flushed(file: int) -> Iterator[None]:
    """Have the disk write while more is made: by itself it would begin when all is there, and be waited for."""
    over = threading.Event()

    def flush() -> None:
        while not over.wait(FLUSH_S):
            os.fdatasync(file)

    with ThreadPoolExecutor(1) as beside:
        flushing = beside.submit(flush)
        try:
            yield
        finally:
            over.set()
        flushing.result()  # or what the disk said: it tells each failure once


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[int]:
    file = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.exists() and os.path.samestat(os.fstat(file), partial.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # locked, or renamed by the one who had the lock until now
            raise ResourceError(f"{partial} is being written by another process; wait for it, or end it")
        yield file
    finally:
        os.close(file)


def _skeleton(tree: Any, made: dict[Stream, Tensor]) -> Any:
    """The same tree with tensors that have a size and no numbers: memory that is never touched is never taken."""
    if isinstance(tree, Stream):
        if tree not in made:
            made[tree] = torch.empty(tree.shape, dtype=tree.dtype)
        return made[tree]
    if isinstance(tree, dict):
        return type(tree)((key, _skeleton(value, made)) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(_skeleton(item, made) for item in tree)
    return tree


def _places(tree: Any, stored: Any) -> Iterator[tuple[Stream, StoredTensor]]:
    """Pair each Stream with where torch.save put it."""
    if isinstance(tree, Stream):
        assert isinstance(stored, StoredTensor)
        yield tree, stored
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if streams(value):
                yield from _places(value, stored[key])
    elif type(tree) in (list, tuple):
        for value, item in zip(tree, stored, strict=True):
            yield from _places(value, item)


def _fill(file: int, at: int, stream: Stream, progress: Progress, beside: Executor) -> int:
    """Write a tensor's numbers to their place; their checksum, which is computed while the system copies them."""
    end, checksum = at + stream.num_bytes, 0
    for chunk in map(Tensor.contiguous, stream.chunks()):
        assert chunk.dtype == stream.dtype, f"a chunk of {chunk.dtype} for a tensor of {stream.dtype}"
        assert chunk.numel() * chunk.itemsize <= end - at, "more numbers than the tensor has"
        summed = beside.submit(crc.crc32, _bytes(chunk), checksum)
        at = put(file, at, chunk, progress)
        checksum = summed.result()
    assert at == end, f"{end - at} bytes of a tensor were not written"
    return checksum


def put(file: int, at: int, chunk: Tensor, progress: Progress) -> int:
    """Write numbers at a place of a file; the place after them."""
    data = _bytes(chunk)
    while data:
        done = os.pwrite(file, data[:CHUNK], at)
        data, at = data[done:], at + done
        progress(done)
    return at


def _bytes(numbers: Tensor) -> memoryview:
    array: Any = numbers.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
