"""What is to happen when the service is ready, and when its job has so many seconds left.

For whoever wants to act before the end: announce the service, submit the job that takes over. Knows the clock and whom
to call. Does not know what they do; a call that fails is logged, and the service goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


def _nothing(url: str) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Called in a thread of rank 0, each once; they may take their time. Units: seconds left of the job."""

    ready: Callable[[str], None] = _nothing
    """Gets the URL, as soon as requests are answered there."""
    at_seconds_left: Mapping[float, Callable[[], None]] = field(default_factory=dict)


class Countdown(threading.Thread):
    """Calls the hooks of one service, until `stop`. Without an end time only `ready` is called."""

    def __init__(
        self, hooks: Hooks, url: str, end_time: float | None, *, wall: Callable[[], float] = time.time
    ) -> None:
        super().__init__(name="countdown", daemon=True)
        self._hooks, self._url, self._end_time, self._wall = hooks, url, end_time, wall
        self._over = threading.Event()

    def run(self) -> None:
        """Call what is due, in order; what was due before the start is called at once."""
        self._call(lambda: self._hooks.ready(self._url))
        if self._end_time is None:
            return
        for seconds, call in sorted(self._hooks.at_seconds_left.items(), reverse=True):
            if self._over.wait(max(self._end_time - seconds - self._wall(), 0.0)):
                return
            self._call(call)

    def stop(self) -> None:
        """Call nothing more."""
        self._over.set()

    def _call(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (OSError, RuntimeError, ValueError) as e:
            log.warning("a hook failed (%s: %s); the service goes on", type(e).__name__, e)
