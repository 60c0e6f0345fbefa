"""Who comes in: a request that fits the model, while there is room, until the engine ends.

Any thread submits and cancels; the batching thread takes what came from the queue, and says who has left. Knows how
many sequences are inside and how fast they leave. Does not know what becomes of them.
"""

from __future__ import annotations

import queue
import threading
import time

from metaseq_api.core import Request, Stats
from metaseq_api.engine.drain import DrainRate
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.ticket import Ticket
from metaseq_api.errors import NotBegun, Overloaded


class Admission:
    """The door of one engine. closed: why nobody comes in any more; empty while it is open."""

    def __init__(self, limits: Limits, vocab_size: int, stats: Stats, results: ResultCache | None) -> None:
        self.limits, self._vocab_size, self._stats, self._results = limits, vocab_size, stats, results
        self._inbox: queue.SimpleQueue[tuple[Ticket, str]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._drain = DrainRate()
        self._ends_at: float | None = None
        self.num_inside = 0
        """Sequences in work or waiting."""
        self.closed = ""

    # ---- any thread ----

    def submit(self, request: Request) -> Ticket:
        """Raises: RequestError where it does not fit the model, Overloaded, EngineStopped."""
        self.limits.check(request, self._vocab_size)
        ticket = Ticket(request, lambda t: self._inbox.put((t, "cancel")))
        num = ticket.num_sequences
        with self._lock:
            if self.closed:
                raise NotBegun(self.closed)
            if self._results is not None and (known := self._results.find(request)) is not None:
                ticket.answer(known)
                return ticket
            if self.num_inside + num > self.limits.max_queue:
                self._stats.rejected += 1
                raise Overloaded(
                    f"{self.num_inside} sequences are in work or waiting and this request brings {num}; "
                    f"the server takes {self.limits.max_queue}: try again later",
                    retry_after_s=self._drain.wait_s(self.num_inside + num - self.limits.max_queue, time.monotonic()),
                )
            self._drain.begin(time.monotonic())
            self.num_inside += num
            self._inbox.put((ticket, "add"))
        return ticket

    def end_by(self, deadline: float) -> int:
        """Take no more, and end the rest then; a later call can only shorten. How many sequences are inside.

        Units: seconds of the monotonic clock.
        """
        with self._lock:
            self.closed = self.closed or "the server is shutting down; ask again elsewhere or later"
            self._ends_at = deadline if self._ends_at is None else min(self._ends_at, deadline)
            num_inside = self.num_inside
        self._inbox.put((_WAKE, "wake"))
        return num_inside

    # ---- the batching thread ----

    @property
    def over(self) -> bool:
        """Whether the engine was told to end, and nobody is inside or the time for them has passed."""
        return self._ends_at is not None and not (self.num_inside and time.monotonic() < self._ends_at)

    def take(self, timeout: float = 0.0) -> tuple[Ticket, str] | None:
        """What came next, "add", "cancel" or another word, or nothing within so many seconds."""
        try:
            return self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None

    def leave(self, ticket: Ticket) -> None:
        """A request that came in has ended."""
        with self._lock:
            self.num_inside -= ticket.num_sequences
            self._drain.note(ticket.num_sequences, time.monotonic(), idle=not self.num_inside)

    def close(self, why: str) -> None:
        """Nobody comes in from here on; the first reason stays."""
        with self._lock:
            self.closed = self.closed or why


_WAKE = Ticket(Request(request_id="", prompts=()), lambda t: None)
