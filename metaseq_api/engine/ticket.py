"""The one answer to one admitted Request: filled by the engine's thread, waited for, or taken bit by bit, by another.

Knows when a request is complete and in which order its completions go back. Does not know how they came about.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from metaseq_api.core import Completion, Delta, Request
from metaseq_api.core.pending import PendingAnswer


class Ticket(PendingAnswer):
    """Implements core.protocols.Answer."""

    def __init__(self, request: Request, on_cancel: Callable[[Ticket], None]) -> None:
        super().__init__()
        self.request = request
        self.arrived = time.monotonic()
        self._on_cancel = on_cancel
        self._finished: list[Completion] = []

    @property
    def num_sequences(self) -> int:
        """All samples of all prompts."""
        return len(self.request.prompts) * self.request.params.num_samples

    def cancel(self) -> None:
        if not self.ended:
            self._on_cancel(self)

    def add(self, completion: Completion) -> list[Completion] | None:
        """Engine: one more sample is done; the whole answer with the last one, which `end` then hands over."""
        self._finished.append(completion)
        if len(self._finished) < self.num_sequences:
            return None
        return _best(self._finished, self.request.params.n)

    def answer(self, completions: list[Completion]) -> None:
        """Engine: complete the whole answer at once, where it was known before."""
        if self.request.stream:
            self._deltas.extend(map(Delta.of, completions))
        self.end(completions)


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
