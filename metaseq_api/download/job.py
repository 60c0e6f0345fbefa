"""Brings many files to one folder, some at a time, with one sign of progress.

Knows threads, disk space and what is there already. Does not know models, nor HTTP. The first file that cannot be had
ends the others where they are: the same job later goes on from there.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from metaseq_api.download.catalogue import File
from metaseq_api.download.fetch import Patience, arrived, check_length, fetch, insist, kept
from metaseq_api.download.web import Web
from metaseq_api.errors import MetaseqApiError, ResourceError, SettingsError
from metaseq_api.progress import progress_bar

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
LEAVE_S = 1.0
"""How long threads that were told to stop are waited for; one that sits in a stalled read dies with the process."""


class _Stopped(Exception):
    """Another file failed, or Ctrl-C."""


class _Crew:
    """Threads that do one thing to each of many items, and the flag that ends them."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._stop = threading.Event()

    def pause(self, seconds: float) -> None:
        """Wait. Raises: _Stopped."""
        if self._stop.wait(seconds):
            raise _Stopped

    def each(self, do: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Do it to every item; the results in order. Raises: the first MetaseqApiError."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, R] | MetaseqApiError | None] = queue.SimpleQueue()
        for i in range(len(items)):
            todo.put(i)

        def work() -> None:
            try:
                with contextlib.suppress(queue.Empty, _Stopped):
                    while not self._stop.is_set():
                        i = todo.get_nowait()
                        done.put((i, do(items[i])))
            except MetaseqApiError as error:
                done.put(error)
            finally:
                done.put(None)

        # daemons: a read that waits for a dead server must not keep Ctrl-C waiting
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._num_threads, len(items)))]
        results: dict[int, R] = {}
        try:
            for thread in threads:
                thread.start()
            for _ in range(len(threads)):
                while (found := done.get()) is not None:
                    if isinstance(found, MetaseqApiError):
                        raise found
                    results[found[0]] = found[1]
        finally:
            if len(results) < len(items):
                self._stop.set()
            until = time.monotonic() + LEAVE_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
        assert len(results) == len(items), "a thread ended before its work"
        return [results[i] for i in range(len(items))]


def download(
    files: Sequence[File],
    folder: Path,
    *,
    jobs: int = 4,
    web: Web | None = None,
    patience: Patience | None = None,
    pause: Callable[[float], object] | None = None,
) -> list[Path]:
    """Bring to `folder` what is not there, `jobs` files at a time; the paths of all. `pause` waits between tries.

    Raises: as `fetch` and `kept` do, and ResourceError where the folder or its disk cannot take them.
    """
    if jobs < 1:
        raise SettingsError(f"--jobs is {jobs}; it must be at least 1")
    web, patience, crew = web or Web(), patience or Patience(), _Crew(jobs)
    pause = pause or crew.pause
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder} cannot be made: {error.strerror}; name another folder") from None

    def length(file: File) -> int:
        return insist(lambda: web.length(file.url), file.url, patience, pause)

    def missing(file: File) -> int | None:
        """Its length, None where it is here."""
        known: list[int] = []

        def once() -> int:
            if not known:
                known.append(length(file))
            return known[0]

        try:
            if kept(file, folder, once):
                return None
        except OSError as error:
            raise ResourceError(f"{folder / file.name} cannot be read: {error.strerror}; mend it first") from None
        check_length(file, once())
        return once()

    log.info("%s: asking for the lengths of %d files", folder, len(files))
    totals = crew.each(missing, files)
    wanted = [(file, total) for file, total in zip(files, totals, strict=True) if total is not None]
    log.info("%s: %d files are here, %d to fetch", folder, len(files) - len(wanted), len(wanted))
    left = sum(max(0, total - arrived(file, folder)) for file, total in wanted)
    free = shutil.disk_usage(folder).free
    if left > free:
        raise ResourceError(f"{left} bytes are to come, and {folder} has {free} free; make room or name another folder")
    lock = threading.Lock()
    with progress_bar("fetching") as begin:
        tell = begin(left)

        def progress(num_bytes: int) -> None:
            crew.pause(0)
            with lock:
                tell(num_bytes)

        crew.each(lambda item: fetch(item[0], folder, web, patience=patience, pause=pause, progress=progress), wanted)
    return [folder / file.name for file in files]
