"""What becomes of tokens that were drawn: the texts they add to, the samples they end, and who is told of it.

Knows tracks and their requests. Does not know steps, logits, or when a request is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from metaseq_api.core import Delta, FinishReason, Stats
from metaseq_api.engine.book import Book
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.sampler import Scored
from metaseq_api.engine.ticket import Ticket
from metaseq_api.engine.track import Track
from metaseq_api.scheduling.scheduler import Scheduler
from metaseq_api.tokenizer import EOS_ID

PORTION = 32
"""Units: tokens. So many are told at a time: the front end, on a core of its own, says them while the next are written
down, and while the next step is planned; when that computes on all cores it is done."""


class Words:
    """Called by the engine's thread alone. `forget` drops a request that has ended; `then` is called whenever whoever
    streams was woken."""

    def __init__(
        self,
        book: Book,
        scheduler: Scheduler,
        stats: Stats,
        results: ResultCache | None,
        forget: Callable[[Ticket], None],
    ) -> None:
        self._book, self._scheduler, self._stats, self._results = book, scheduler, stats, results
        self._forget = forget
        self._told: set[Ticket] = set()
        self.then: Callable[[], None] = lambda: None

    def add(self, tokens: Mapping[int, Scored]) -> None:
        """Tokens by seq_id, each the last of its sequence."""
        for at, (seq_id, scored) in enumerate(tokens.items(), 1):
            track = self._book.find(seq_id)
            if track is not None:
                track.take(scored, EOS_ID)
                if track.reason is not None:
                    self.end(track)
                elif (teller := track.teller) is not None:
                    word = teller.word()
                    if word is None:
                        self.tell(track, teller.tell())
                    elif not track.ticket.say(word):
                        self.tell(track, Delta(0, 0, word, 1))
            if at % PORTION == 0:
                self.notify()

    def end(self, track: Track) -> None:
        """A sample is done: hand it over, and forget the request when it was the last."""
        self._scheduler.finish(track.seq)
        self._book.drop(track)
        track.reason = track.reason or FinishReason.LENGTH
        self._stats.finish(track.seq.seq_id, track.reason.value, time.monotonic())
        completion = track.completion(self._book.leader(track))
        if track.teller is not None:
            self.tell(track, track.teller.tell_rest(completion))
        whole = track.ticket.add(completion)
        if whole is not None:
            if self._results is not None:  # before it is handed over: it may be asked for again at once
                self._results.add(track.ticket.request, whole)
            track.ticket.end(whole)
            self._told.add(track.ticket)
            self._forget(track.ticket)

    def tell(self, track: Track, delta: Delta | None) -> None:
        """Something to stream, if there is."""
        if delta is not None:
            track.ticket.push(delta)
            self._told.add(track.ticket)

    def notify(self) -> None:
        """Wake those that were told something: many at once, for they compete for the interpreter."""
        for ticket in self._told:
            ticket.notify()
        self._told.clear()
        self.then()
