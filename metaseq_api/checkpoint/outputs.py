"""Writes the files of a resharding job, several at a time, and leaves alone those that the same job wrote before.

A file carries the digest of the job that wrote it, and has its name only when it is whole: what an interrupted run had
finished, the next one finds by that. Knows files and threads. Does not know what is in them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaseq_api.checkpoint import write
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.contents import JOB
from metaseq_api.errors import CheckpointError
from metaseq_api.progress import Progress

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised where the same inputs and flags come to mean other files."""


@dataclass(frozen=True, slots=True)
class Output:
    """One file to be written; `lost`, what of its inputs is not in it."""

    tree: dict[str, Any]
    path: Path
    lost: tuple[str, ...]

    @staticmethod
    def of(tree: dict[str, Any], path: Path, job: str, lost: Iterable[str] = ()) -> Output:
        """Mark the tree as the job's."""
        return Output(tree | {JOB: job}, path, tuple(lost))

    @property
    def num_bytes(self) -> int:
        return sum(stream.num_bytes for stream in write.streams(self.tree))

    def is_written(self) -> bool:
        """Whether the same job has written it before."""
        if not self.path.is_file():
            return False
        try:
            tree = Archive(self.path).tree
        except CheckpointError:
            return False
        return isinstance(tree, dict) and tree.get(JOB) == self.tree[JOB]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, under its name only when it is whole. Raises: ResourceError."""
    with write.finished(path, len(data)) as (file, _):
        os.ftruncate(file, len(data))
        write.put(file, 0, torch.frombuffer(bytearray(data), dtype=torch.uint8), lambda done: None)


def job_id(inputs: Iterable[Path], *said: object) -> str:
    """Digest what decides the outputs: which files, as they are now, and what was asked for."""
    files = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path in inputs for stat in [path.stat()]]
    return hashlib.blake2b(repr((FORMAT, sorted(files), said)).encode(), digest_size=16).hexdigest()


class _Cancelled(Exception):
    """Another file of the job failed."""


def write_all(outputs: Sequence[Output], begin: Callable[[int], Progress], num_threads: int = 1) -> list[Path]:
    """Write what is not there yet; the paths of all.

    Raises: ResourceError, CheckpointError; the files that were finished by then stay.
    """
    if lost := dict.fromkeys(name for output in outputs for name in output.lost):
        log.warning("not kept: %s", ", ".join(ascii(name)[1:-1] for name in lost))
    todo = [output for output in outputs if not output.is_written()]
    if len(todo) < len(outputs):
        log.info("%d of %d files are whole already, by the same job", len(outputs) - len(todo), len(outputs))
    told = begin(sum(output.num_bytes for output in todo))
    if num_threads <= 1 or len(todo) <= 1:
        for output in todo:
            write.save(output.tree, output.path, told)
    else:
        _write_in_threads(todo, told, num_threads)
    return [output.path for output in outputs]


def _write_in_threads(todo: Sequence[Output], told: Progress, num_threads: int) -> None:
    """Each thread writes a file at a time; when one fails, or Ctrl-C comes, the others give theirs up."""
    given_up, lock = threading.Event(), threading.Lock()

    def tell(done: int) -> None:
        if given_up.is_set():
            raise _Cancelled
        with lock:
            told(done)

    def one(output: Output) -> None:
        if not given_up.is_set():
            write.save(output.tree, output.path, tell)

    # a thread that computes has a pool of its own; one thread in each is enough to copy
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(one, output) for output in todo]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            given_up.set()
            raise
