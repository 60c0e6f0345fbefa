"""One file, brought here whole: a transfer that goes on where an earlier one broke off, even one of another day.

What has arrived lies in NAME.part, and NAME.part.json says of which version of the file it is; the final name is given
only to a file that is as long as the server says, no shorter than its weights, and safe on the disk. Does not know how
many files there are, nor who waits: a `progress` or `pause` that raises ends a fetch, which may be taken up again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from metaseq_api.download.catalogue import File
from metaseq_api.download.web import Broken, Changed, Web, shown
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch, ResourceError, TokenizerError
from metaseq_api.progress import Progress

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 1 << 20
LEAST = 0.9
"""Of its weights' bytes that a file must have. All of them should be there, but no published file was measured here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often a transfer that gets no further is tried, and how long it waits in between."""

    tries: int = 8
    first_wait_s: float = 1.0
    most_wait_s: float = 120.0

    def wait_s(self, failures: int, asked_s: float) -> float:
        """Double each time, or as long as the server asked, up to `most_wait_s`."""
        return min(max(self.first_wait_s * 2.0 ** (failures - 1), asked_s), self.most_wait_s)


def insist(
    attempt: Callable[[], T],
    url: str,
    patience: Patience,
    pause: Callable[[float], object],
    arrived: Callable[[], int] = lambda: 0,
) -> T:
    """Do `attempt` until it succeeds; a try after which more has `arrived` than ever before begins the count anew.

    Raises: ResourceError when patience is at its end, and whatever `attempt` raises besides Broken.
    """
    failures, most = 0, arrived()
    while True:
        try:
            return attempt()
        except Broken as error:
            if arrived() > most:
                failures, most = 0, arrived()
            failures += 1
            if failures >= patience.tries:
                raise ResourceError(
                    f"{shown(url)}: {error}, {failures} times in a row; check the network and run the same "
                    "command again: it goes on from here"
                ) from None
            wait_s = patience.wait_s(failures, error.wait_s)
            log.warning("%s: %s; trying again in %.0f s", shown(url), error, wait_s)
            pause(wait_s)


def kept(file: File, folder: Path, length: Callable[[], int]) -> bool:
    """Whether the file is there already, whole: by its checksum, else as long as the server says (`length`).

    Raises: TokenizerError or CheckpointMismatch where a file of this name is another one; it is left alone.
    """
    path = folder / file.name
    if not path.exists():
        return False
    if file.md5 is not None:
        if path.is_file() and _md5(path) == file.md5:
            return True
        raise TokenizerError(f"{path} is not OPT's: its md5 is not {file.md5}; move it away, or name another folder")
    if path.is_file() and path.stat().st_size == length():
        return True
    raise CheckpointMismatch(
        f"{path} has {path.stat().st_size} bytes, {shown(file.url)} has {length()}: it was cut short or is of another "
        "model or edition; move it away, or name another folder"
    )


def arrived(file: File, folder: Path) -> int:
    """How many bytes of it an earlier transfer left."""
    part = folder / f"{file.name}.part"
    return part.stat().st_size if part.is_file() else 0


def fetch(
    file: File,
    folder: Path,
    web: Web,
    *,
    patience: Patience,
    pause: Callable[[float], object],
    progress: Progress = lambda num_bytes: None,
) -> Path:
    """Bring a file to `folder`; `progress` hears of bytes on the disk, fewer where what was there had to go.

    Raises: CheckpointNotFound where the server has no such file, CheckpointCorrupt or TokenizerError where it is not
    what it should be, ResourceError where network or disk give up.
    """
    with _opened(folder / file.name, progress) as part:
        insist(lambda: _try(file, part, web), file.url, patience, pause, lambda: part.size)
        _check(file, part)
        part.finish()
    return part.final


class _Part:
    """NAME.part and its note. `tag` is None where it is of no known version, and so cannot be gone on with."""

    def __init__(self, final: Path, fd: int, progress: Progress) -> None:
        self.final, self._fd, self._progress = final, fd, progress
        self.path, self._note = final.with_name(f"{final.name}.part"), final.with_name(f"{final.name}.part.json")
        self.size = os.fstat(fd).st_size
        self.total: int | None = None
        self.tag: str | None = None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(self._note.read_text("utf-8"))
            self.total, self.tag = int(note["total"]), str(note["tag"])
        if self.total is None or self.tag is None or self.size > self.total:
            self.begin(None, None)

    def begin(self, total: int | None, tag: str | None) -> None:
        """Start from nothing, with a version of the file."""
        os.ftruncate(self._fd, 0)
        gone, self.size, self.total, self.tag = self.size, 0, total, tag
        if total is None or tag is None:
            self._note.unlink(missing_ok=True)
        else:
            self._note.write_text(json.dumps({"total": total, "tag": tag}), "utf-8")
        self._progress(-gone)

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, self.size)
            self.size, view = self.size + done, view[done:]
        self._progress(len(data))

    def finish(self) -> None:
        """Give it its final name."""
        os.fsync(self._fd)
        os.replace(self.path, self.final)
        self._note.unlink(missing_ok=True)
        folder = os.open(self.final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.begin(None, None)


@contextlib.contextmanager
def _opened(final: Path, progress: Progress) -> Iterator[_Part]:
    """The .part, which no other process writes; nothing is left of an empty one."""
    path = final.with_name(f"{final.name}.part")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = path.exists() and os.path.samestat(os.fstat(fd), path.stat())
            except BlockingIOError:
                mine = False
            if not mine:  # locked, or renamed by the one who had the lock until now
                raise ResourceError(f"{path} is being fetched by another process; wait for it, or end it")
            part = _Part(final, fd, progress)
            try:
                yield part
            finally:
                if part.size == 0:
                    part.remove()
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full while fetching {final}; what has arrived is kept: make room and run this again"
            ) from None
        raise ResourceError(
            f"{path} cannot be written: {error.strerror or error}; mend it, or name another folder"
        ) from None


def _try(file: File, part: _Part, web: Web) -> None:
    """One transfer, from where the last one broke off. Raises: Broken where it breaks off too."""
    while part.total is None or part.size < part.total:
        try:
            answer = web.ask(file.url, part.size, tag=part.tag if part.size else None)
        except Changed:
            part.begin(None, None)
            raise
        with answer:
            if answer.start == 0:
                check_length(file, answer.total)
                part.begin(answer.total, answer.tag)
            elif answer.total != part.total:
                part.begin(None, None)
                raise Changed("the file has changed")
            try:
                while part.size < answer.end:
                    part.append(answer.read(min(CHUNK, answer.end - part.size)))
            except Broken:
                if part.tag is None:  # what comes next might be of another version
                    part.begin(None, None)
                raise


def check_length(file: File, total: int) -> None:
    """Raises: CheckpointCorrupt where a file of `total` bytes cannot hold its weights."""
    if total == 0 or total < LEAST * file.weights:
        raise CheckpointCorrupt(
            f"{shown(file.url)} has {total} bytes, but its weights take {file.weights}: it is not what its name says; "
            "try another address with --url"
        )


def _check(file: File, part: _Part) -> None:
    """Refuse and remove a file that is all there and still wrong."""
    if file.md5 is not None and _md5(part.path) != file.md5:
        part.remove()
        raise TokenizerError(f"{shown(file.url)} is not OPT's: its md5 is not {file.md5}; try --tokenizer-url")
    with part.path.open("rb") as begun:
        is_zip = begun.read(4) == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(part.path):
        part.remove()
        raise CheckpointCorrupt(
            f"{shown(file.url)} is cut short on the server; removed: try another address with --url"
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
