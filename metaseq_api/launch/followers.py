"""The other ranks of a model whose rank 0 is this very process, a notebook's say: started, looked at, ended.

Knows processes. Does not know torch, or what a rank does; installs no signal handler, and prints nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import NoReturn

from metaseq_api.errors import MetaseqApiError, RankFailed
from metaseq_api.launch.order import Order
from metaseq_api.launch.ranks import HOST_MODULE, SETTLE_S, TERM_S, Child, kill, start, unnamed_file, verdict, weight
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings

PARTING_S = 3.0
"""Units: seconds that dismissed ranks have to end by themselves."""

_LOOK_S = 0.02


def meeting_place() -> int:
    """A file for ranks to meet at, as a descriptor that stays open as long as this process.

    torch opens it by that number whenever it pleases, the last time when its store is collected; another file must not
    have the number by then.
    """
    fd, name = tempfile.mkstemp()
    os.unlink(name)
    return fd


class Followers:
    """Ranks 1 and up as children of the calling thread, with which they die; `end` leaves none behind."""

    def __init__(self, settings: Settings, ranks: Sequence[RankInfo], store: int, *, module: str = HOST_MODULE) -> None:
        self._files = contextlib.ExitStack()
        self._children: list[Child] = []
        try:
            for rank in ranks:
                order = Order(
                    settings=settings,
                    rank=rank,
                    terms=Terms(),
                    listen_fd=None,
                    words_fd=unnamed_file(self._files),
                    parent_pid=os.getpid(),
                    verbose=False,
                )
                self._children.append(start(order, module, store))
        except MetaseqApiError:
            self.end(0)
            raise

    def check(self) -> None:
        """Raises: RankFailed where one has ended."""
        if any(not c.alive for c in self._children):
            self._raise()

    def blame(self) -> None:
        """Raises: RankFailed where one ends within a moment, so that rank 0 only failed because of it."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and all(weight(c) < 2 for c in self._children):
            time.sleep(_LOOK_S)
        self.check()

    def end(self, grace_s: float = PARTING_S) -> None:
        """End all: by themselves within `grace_s`, else by SIGTERM, else by SIGKILL."""
        self._await(grace_s)
        for child in self._children:
            child.send(signal.SIGTERM)
        self._await(TERM_S)
        kill(self._children)
        self._files.close()

    def _await(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))

    def _raise(self) -> NoReturn:
        found = verdict(max(self._children, key=weight))
        error = found if isinstance(found, RankFailed) else RankFailed(str(found))
        error.exit_code = found.exit_code
        raise error
