"""An answer that one thread fills and another waits for, or takes bit by bit.

Knows when it is complete and in which order it is read. Does not know where it comes from: the engine's thread
(`engine.ticket`) or the other end of a line (`server.remote`). Deltas wait here for their reader: no more than the
whole answer would be, however slow it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from metaseq_api.core.completion import Completion, Delta
from metaseq_api.errors import MetaseqApiError


class PendingAnswer:
    """Implements core.protocols.Answer, but for `cancel`."""

    admitted = True

    def __init__(self) -> None:
        self.ended = False
        self._ended = threading.Event()  # the same, for those who wait
        self._completions: list[Completion] = []
        self._error: MetaseqApiError | None = None
        self._deltas: deque[Delta] = deque()
        self._wake: Callable[[], None] | None = None
        self._hear: Callable[[str], object] | None = None

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Units: seconds. Raises: TimeoutError; else what the request ended with."""
        if not (self.ended or self._ended.wait(timeout)):  # either may be set a moment before the other
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._completions

    def watch(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if self._deltas or self.ended:  # before anybody watched
            wake()

    def hand_to(self, hear: Callable[[str], object]) -> None:
        self._hear = hear

    def take(self) -> list[Delta]:
        """Raises: what the request ended with, once nothing is left."""
        ended = self.ended  # looked at first: what comes before the end is there by then
        taken = [self._deltas.popleft() for _ in range(len(self._deltas))]
        if ended and not taken and self._error is not None:
            raise self._error
        return taken

    def events(self) -> Iterator[Delta]:
        woken = threading.Event()
        self.watch(woken.set)
        while True:
            woken.wait()
            woken.clear()
            ended = self.ended
            taken = self.take()
            yield from taken
            if ended and not taken:
                return
            if ended:
                woken.set()

    # whoever fills it

    def say(self, word: str) -> bool:
        """The text of one more token of the only sample, which somebody may want at once; whether it was handed on.
        Else it is to be pushed."""
        if self._hear is None or self._deltas:
            return False
        self._hear(word)
        return True

    def push(self, delta: Delta) -> None:
        """Something to stream, which waits to be taken; `notify` tells of it."""
        self._deltas.append(delta)

    def notify(self) -> None:
        """Wake whoever watches this."""
        if self._wake is not None:
            self._wake()

    def end(self, completions: list[Completion]) -> None:
        """Hand the answer over; `notify` tells those who watch."""
        self._completions = completions
        self.ended = True
        self._ended.set()

    def fail(self, error: MetaseqApiError) -> None:
        """End with an error, and wake whoever watches. The first ending counts."""
        if not self.ended:
            self._error = error
            self.ended = True
            self._ended.set()
            self.notify()
