"""The one answer to one admitted Request: filled by the engine's thread, waited for by another.

Knows when a request is complete and in which order its completions go back. Does not know how they came about.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from metaseq_api.core import Completion, Request
from metaseq_api.errors import MetaseqApiError


class Ticket:
    """Implements core.protocols.Answer."""

    def __init__(self, request: Request, on_cancel: Callable[[Ticket], None]) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._ended = threading.Event()
        self._completions: list[Completion] = []
        self._error: MetaseqApiError | None = None

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

    def cancel(self) -> None:
        if not self.ended:
            self._on_cancel(self)

    def add(self, completion: Completion) -> None:
        """Engine: one more sample is done; the last one completes the answer."""
        self._completions.append(completion)
        if len(self._completions) == self.num_sequences:
            self._completions = _best(self._completions, self.request.params.n)
            self._ended.set()

    def answer(self, completions: list[Completion]) -> None:
        """Engine: complete the whole answer at once, where it was known before."""
        self._completions = completions
        self._ended.set()

    def fail(self, error: MetaseqApiError) -> None:
        """Engine: end the request with an error. The first ending counts."""
        if not self.ended:
            self._error = error
            self._ended.set()


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
