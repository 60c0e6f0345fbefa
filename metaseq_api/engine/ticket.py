"""The one answer to one admitted Request: filled by the engine's thread, waited for, or taken bit by bit, by another.

Knows when a request is complete and in which order its completions go back. Does not know how they came about.
Deltas wait here for their reader: no more than the whole answer would be, however slow it is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from metaseq_api.core import Completion, Delta, Request
from metaseq_api.errors import MetaseqApiError


class Ticket:
    """Implements core.protocols.Answer."""

    def __init__(self, request: Request, on_cancel: Callable[[Ticket], None]) -> None:
        self.request = request
        self.arrived = time.monotonic()
        self._on_cancel = on_cancel
        self._ended = threading.Event()
        self._completions: list[Completion] = []
        self._error: MetaseqApiError | None = None
        self._deltas: deque[Delta] = deque()
        self._wake: Callable[[], None] | None = None

    @property
    def num_sequences(self) -> int:
        """All samples of all prompts."""
        return len(self.request.prompts) * self.request.params.num_samples

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Units: seconds. Raises: TimeoutError; else what the engine ended the request with."""
        if not self._ended.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._completions

    def watch(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if self._deltas or self.ended:  # before anybody watched
            wake()

    def take(self) -> list[Delta]:
        """Raises: what the engine ended the request with, once nothing is left."""
        ended = self.ended  # looked at first: what comes before the end is there by then
        taken = []
        while self._deltas:
            taken.append(self._deltas.popleft())
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

    def cancel(self) -> None:
        if not self.ended:
            self._on_cancel(self)

    def push(self, delta: Delta) -> None:
        """Engine: something to stream; `notify` tells of it."""
        self._deltas.append(delta)

    def notify(self) -> None:
        """Engine: wake whoever streams this."""
        if self._wake is not None:
            self._wake()

    def add(self, completion: Completion) -> list[Completion] | None:
        """Engine: one more sample is done; the whole answer with the last one, which `end` then hands over."""
        self._completions.append(completion)
        if len(self._completions) < self.num_sequences:
            return None
        return _best(self._completions, self.request.params.n)

    def end(self, completions: list[Completion]) -> None:
        """Engine: hand the answer over."""
        self._completions = completions
        self._ended.set()

    def answer(self, completions: list[Completion]) -> None:
        """Engine: complete the whole answer at once, where it was known before."""
        if self.request.stream:
            self._deltas.extend(map(Delta.of, completions))
        self.end(completions)

    def fail(self, error: MetaseqApiError) -> None:
        """Engine: end the request with an error. The first ending counts."""
        if not self.ended:
            self._error = error
            self._ended.set()
            self.notify()


def _best(completions: list[Completion], n: int) -> list[Completion]:
    """The n best samples of each prompt by mean log-probability, prompts in order; all of them in order where best_of
    asks for no more than n."""
    by_prompt: dict[int, list[Completion]] = {}
    for c in sorted(completions, key=lambda c: (c.prompt_index, c.sample_index)):
        by_prompt.setdefault(c.prompt_index, []).append(c)
    kept = []
    for samples in by_prompt.values():
        if len(samples) > n:
            samples.sort(key=lambda c: c.mean_logprob, reverse=True)
        kept += samples[:n]
    return kept
