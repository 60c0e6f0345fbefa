"""What rank 0 says of its service in the registry: where it listens, how far it is, that it lives.

Knows one service's own file. It is a guest in the service: all writing is done by a thread of its own, so that a lost
or full disk is a line in the log and holds nothing up. Does not know who reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from metaseq_api.errors import MetaseqApiError
from metaseq_api.launch.registry import Record, Registry, replace_json
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.progress import Progress
from metaseq_api.settings import Settings

log = logging.getLogger(__name__)

HEARTBEAT_S = 3.0
"""Units: seconds between two signs of life."""
LAST_WRITE_S = 2.0
"""Units: seconds that the end of a service waits for its last word to be written."""


class Recorder:
    """Keeps one file up to date with `record`; `path` None keeps nothing. Every method returns at once."""

    def __init__(
        self, path: Path | None, record: Record, *, clock: Callable[[], float] = time.time, beat_s: float = HEARTBEAT_S
    ) -> None:
        self._path, self._record, self._clock, self._beat_s = path, record, clock, beat_s
        self._changed = threading.Condition()
        self._is_new, self._closed, self._failing = True, False, False
        self._thread = None if path is None else threading.Thread(target=self._keep, name="record", daemon=True)
        if self._thread is not None:
            self._thread.start()

    def loading(self, total: int) -> Progress:
        """The weights begin to be read; gives what is to be told of the bytes that were. Units: total in bytes."""
        begun = time.monotonic()
        done = 0

        def told(count: int) -> None:
            nonlocal done
            done += count
            rate = done / max(time.monotonic() - begun, 1e-9)
            with self._changed:  # the next beat tells it
                self._record = dataclasses.replace(self._record, percent=100 * done / max(total, 1), rate=rate)

        self._tell(state="loading")
        return told

    def ready(self) -> None:
        """Requests are answered."""
        self._tell(state="ready", percent=100.0)

    def draining(self, reason: str = "") -> None:
        """No new requests are taken."""
        self._tell(state="draining", reason=reason)

    def ended(self, reason: str, exit_code: int) -> None:
        """The last word; a second one changes nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._tell(state="ended", reason=reason, exit_code=exit_code)
        if self._thread is not None:
            self._thread.join(LAST_WRITE_S)

    def _tell(self, **fields: str | float | None) -> None:
        with self._changed:
            self._record = dataclasses.replace(self._record, **fields)  # type: ignore[arg-type]
            self._is_new = True
            self._changed.notify()

    def _keep(self) -> None:
        while True:
            with self._changed:
                self._is_new = False
                record = dataclasses.replace(self._record, heartbeat=self._clock())
            self._write(record)
            if record.state == "ended":
                return
            with self._changed:
                self._changed.wait_for(lambda: self._is_new, self._beat_s)

    def _write(self, record: Record) -> None:
        assert self._path is not None
        try:
            replace_json(self._path, dataclasses.asdict(record))
        except OSError as e:
            if not self._failing:
                log.warning("cannot write %s (%s); others do not see how this service is", self._path, e.strerror)
            self._failing = True
            return
        if self._failing:
            log.info("%s is written again", self._path)
        self._failing = False


@contextlib.contextmanager
def recorded(settings: Settings, rank: RankInfo, sock: socket.socket | None) -> Iterator[Recorder]:
    """A Recorder for as long as rank 0 of a service lives that has a name; one that keeps nothing else.

    What ends the block ends the record: an error with its words, else whatever `Recorder.ended` was told.
    """
    now = time.time()
    record = Record(name=settings.service or "", state="starting", heartbeat=now, started=now)
    path = None
    if settings.registry is not None and settings.service is not None and rank.rank == 0 and sock is not None:
        host, port = reached_at(sock, rank.node)
        shown = f"[{host}]" if ":" in host else host
        path = Registry(settings.registry).member_file(settings.service, settings.member)
        record = dataclasses.replace(
            record,
            member=settings.member,
            job=settings.job,
            model="demo" if settings.demo else str(settings.checkpoint),
            node=rank.node,
            host=host,
            port=port,
            url=f"http://{shown}:{port}",
            at_once=settings.max_batch_size,
        )
    recorder = Recorder(path, record)
    try:
        yield recorder
    except MetaseqApiError as e:
        recorder.ended(str(e), e.exit_code)
        raise
    except BaseException as e:
        recorder.ended(f"{type(e).__name__}; its stack is in the log", MetaseqApiError.exit_code)
        raise
    recorder.ended("ended as told", 0)


def reached_at(sock: socket.socket, node: str) -> tuple[str, int]:
    """Where other machines reach a bound socket: by the name SLURM has for this one, if it listens everywhere."""
    host, port = sock.getsockname()[:2]
    address = ipaddress.ip_address(str(host).partition("%")[0])
    return (node if address.is_unspecified else str(address)), int(port)
