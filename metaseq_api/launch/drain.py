"""A dignified end: from the first stop signal to the last answer, in a thread of rank 0.

    at once      the engine takes no more requests (503 with Retry-After), and each answer ends its connection
    meanwhile    running requests, streams included, go on until the deadline; a further signal may shorten it
    then         what still runs is answered 503 (in a stream: as an event), nobody is let in, the last words are sent

Knows the order of these. Does not know the engine or the server but for what it asks of them, nor what a signal means.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from metaseq_api.errors import RankFailed
from metaseq_api.launch.signals import Signals
from metaseq_api.launch.terms import Deadline

log = logging.getLogger(__name__)

STUCK_S = 1.0
"""Units: seconds beyond the deadline after which a step that has not come back is not waited for."""
LAST_S = 1.0
"""Units: seconds at least that clients have to take their answers once the last is made."""


class Engine(Protocol):
    @property
    def ended(self) -> bool: ...

    def end_by(self, deadline: float) -> int: ...


class Server(Protocol):
    def hang_up(self) -> None: ...

    def stop(self, grace_s: float) -> None: ...


class Drain(threading.Thread):
    """Ends the engine and the server when a signal says so; `begun` hears which. `signals.wake()` tells it that the
    engine has ended.
    """

    def __init__(
        self,
        engine: Engine,
        server: Server,
        deadline: Deadline,
        signals: Signals,
        begun: Callable[[str], None] = lambda signal_name: None,
    ) -> None:
        super().__init__(name="drain", daemon=True)
        self._engine, self._server, self._deadline, self._signals = engine, server, deadline, signals
        self._begun = begun
        self._heard_all = threading.Event()

    def run(self) -> None:
        """Wait for the first signal, and see the service through to its end."""
        try:
            asked = self._see_through()
        finally:
            self._heard_all.set()
        if asked:
            self._server.stop(max(LAST_S, self._deadline.left_s))

    def let_go(self) -> None:
        """Return when it waits for no signal any more: soon, once the engine has ended and `wake` was called."""
        self._heard_all.wait()

    def _see_through(self) -> bool:
        """Until the engine has ended; whether a signal asked for it."""
        while not self._signals.stops:
            self._signals.wait()
            if self._engine.ended:  # by itself: that is told elsewhere
                return False
        self._server.hang_up()
        self._begun(signal.Signals(self._signals.stops[0]).name)
        began = time.monotonic()
        heard = 0
        while not self._engine.ended:
            for signum in self._signals.stops[heard:]:
                num_running = self._engine.end_by(self._deadline.hear(signum))
                name = signal.Signals(signum).name
                log.info("%s: %d running sequences have %.1f s", name, num_running, self._deadline.left_s)
            heard = len(self._signals.stops)
            if self._deadline.left_s == 0 and time.monotonic() - (self._deadline.at or 0.0) > STUCK_S:
                self._give_up()
            self._signals.wait(self._deadline.left_s + STUCK_S)
        how = (
            "every running request was answered" if self._deadline.left_s else "the time is over, and the rest got 503"
        )
        log.info("%s, %.1f s after the signal", how, time.monotonic() - began)
        return True

    def _give_up(self) -> None:
        """The engine is held up in a step that does not come back: tell the clients, and end without it."""
        log.error("a step does not come back; some rank is stuck or lost, so its requests cannot be ended")
        self._server.stop(0)
        os._exit(RankFailed.exit_code)
