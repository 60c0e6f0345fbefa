"""Which requests' time is over. Knows tickets and a clock's seconds; not what becomes of a request then."""

from __future__ import annotations

import math

from metaseq_api.engine.ticket import Ticket


class Deadlines:
    """The tickets in work that have a deadline. Asking costs nothing until the next one is due."""

    def __init__(self) -> None:
        self._due: dict[Ticket, float] = {}
        self._next = math.inf

    def add(self, ticket: Ticket) -> None:
        """Watch a ticket, if its request has a deadline."""
        at = ticket.request.deadline_s
        if at is not None:
            self._due[ticket] = at
            self._next = min(self._next, at)

    def remove(self, ticket: Ticket) -> None:
        """Forget a ticket, watched or not."""
        self._due.pop(ticket, None)

    def over(self, now: float) -> list[Ticket]:
        """List those whose time has come; each is told once. Units: seconds of the clock that set them."""
        if now < self._next:
            return []
        ended = [ticket for ticket, at in self._due.items() if at <= now]
        for ticket in ended:
            del self._due[ticket]
        self._next = min(self._due.values(), default=math.inf)
        return ended
