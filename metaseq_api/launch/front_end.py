"""The front end of a service as a process of rank 0's: started early, told when to listen and when to stop.

    to it      serve | hang_up | stop seconds        beside what the engine says (`engine.outlet`)
    from it    serving, or refused error

It has the listening socket alone, and dies with the thread that started it. Knows the process and these words. Does not
know HTTP, or what a request is; `metaseq_api.front` is what runs there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

from metaseq_api.core.address import local_url
from metaseq_api.core.line import Line
from metaseq_api.core.plain import error_from_plain
from metaseq_api.errors import RankFailed, ResourceError
from metaseq_api.launch.order import settings_from_dict, settings_to_dict
from metaseq_api.launch.post_mortem import is_held
from metaseq_api.launch.ranks import ending, spawn
from metaseq_api.launch.signals import STOPS
from metaseq_api.settings import Settings

log = logging.getLogger(__name__)

FRONT_MODULE = "metaseq_api.front"
HELD_BACK = frozenset({*map(signal.Signals, STOPS), signal.SIGQUIT})
"""Signals that wait until it can leave them to rank 0."""
HELD_S = 5.0
"""Units: seconds between two looks at whether it is stopped; found so twice, it is given up."""
LAST_S = 3.0
"""Units: seconds beyond its grace in which the front end says its last words and ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontOrder:
    """Be the front end of a service with these settings; `facts` says of the engine what never changes."""

    settings: Settings
    facts: dict[str, Any]
    listen_fd: int
    line_fd: int
    parent_pid: int
    verbose: bool

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(fields | {"settings": settings_to_dict(self.settings)})

    @classmethod
    def from_json(cls, text: str) -> FrontOrder:
        fields = json.loads(text)
        return cls(**fields | {"settings": settings_from_dict(fields["settings"])})


class FrontEnd:
    """Its process. `sock` goes there and is closed here; the main thread must make this, for the process dies with it.

    Raises: ResourceError where the machine is short of processes.
    """

    def __init__(self, settings: Settings, sock: socket.socket, facts: dict[str, Any]) -> None:
        here, there = socket.socketpair()
        self.line = Line(here)
        self._serving = self._stopped = False
        self.url = local_url(sock)
        with sock, there:
            order = FrontOrder(
                settings=settings,
                facts=facts,
                listen_fd=sock.fileno(),
                line_fd=there.fileno(),
                parent_pid=os.getpid(),
                verbose=logging.getLogger().isEnabledFor(logging.DEBUG),
            )
            safe_path = ["-P"] if sys.version_info >= (3, 11) else []
            argv = [sys.executable, *safe_path, "-m", FRONT_MODULE]
            try:
                self._process = spawn(argv, order.to_json(), [order.listen_fd, order.line_fd], HELD_BACK)
            except OSError as e:
                raise ResourceError(f"cannot start the front end: {e.strerror}; too many processes here") from e

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._serving:
            self._process.kill()
        self.stop(0)
        self.line.hang_up()

    def serve(self) -> None:
        """Have it listen. Raises: what it refuses to with; RankFailed where it has ended."""
        self.line.send("serve")
        what, *of = next(self.line.messages(), ("gone",))
        if what == "refused":
            raise error_from_plain(of[0])
        if what == "gone":
            raise RankFailed(self.ending())
        self._serving = True
        threading.Thread(target=self._watch, name="front end", daemon=True).start()

    def hang_up(self) -> None:
        """Have every answer end its connection from now on."""
        self.line.send("hang_up")

    def stop(self, grace_s: float) -> None:
        """Have it take nothing new and end within `grace_s`; returns when it has, or was killed for it."""
        self._stopped = True
        self.line.send("stop", grace_s)
        try:
            self._process.wait(grace_s + LAST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def _watch(self) -> None:
        """Nobody is answered by one that SIGSTOP or a debugger holds; its end is found by whoever hears the line."""
        held = False
        while self._process.poll() is None:
            was, held = held, is_held(self._process.pid)
            if was and held:
                log.error("the HTTP front end (pid %d) is stopped, by SIGSTOP or a debugger", self._process.pid)
                self.kill()
            threading.Event().wait(HELD_S)

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped

    def ending(self) -> str:
        """How it ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_S)
        how = "hung up" if self._process.poll() is None else ending(self._process.returncode)
        return f"the HTTP front end of rank 0 (pid {self._process.pid}) {how}"
