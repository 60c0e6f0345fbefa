"""Which sockets have something: epoll, in place of the poll in waitress's loop.

That loop asks every connection, each time it waits, whether it would read or write. Here one is asked after something
was done with it, and the kernel keeps its answer: with 256 streams that waiting is nothing, not 0.5 ms a step.

Knows waitress's dispatchers. Does not know what they are for.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Dispatcher = Any
"""What wasyncore has in its maps: `_fileno`, `readable`, `writable`, `handle_...`; waitress has no types."""


class Sockets:
    """The dispatchers of a map of wasyncore's. One thread looks and waits; any may forget."""

    def __init__(self, of: dict[int, Dispatcher]) -> None:
        self._of = of
        self._wants: dict[int, int] = {}
        self._epoll = select.epoll()

    def look_at(self, one: Dispatcher) -> None:
        """Ask it anew what it waits for; not called, it would be waited for as before. A closed one is left out."""
        fd = one._fileno
        if fd is None:
            return
        wants = select.EPOLLIN if one.readable() else 0
        if one.writable() and not one.accepting:
            wants |= select.EPOLLOUT
        before = self._wants.get(fd)
        if wants != before:
            self._wants[fd] = wants
            (self._epoll.register if before is None else self._epoll.modify)(fd, wants)

    def wait(self, timeout_s: float) -> list[tuple[Dispatcher, int]]:
        """Those that something happened to, with the flags of poll. Units: seconds."""
        most = len(self._wants) or 1  # by itself it tells of 1023
        return [(self._of[fd], flags) for fd, flags in self._epoll.poll(timeout_s, most) if fd in self._of]

    def forget(self, one: Dispatcher) -> None:
        """No more of it, before it is closed: the kernel goes on where another process has that socket too."""
        fd = one._fileno
        if self._wants.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def attend(self, fd: int, hear: Callable[[], bool]) -> None:
        """Have `hear` called when there is something to read, until it returns False, or raises something."""
        self._of[fd] = ear = Ear(fd, hear, self)
        self.look_at(ear)

    def close(self) -> None:
        """The end."""
        self._epoll.close()


class Ear:
    """Something that is only read, by `hear`, until that says it has ended."""

    accepting = False

    def __init__(self, fd: int, hear: Callable[[], bool], sockets: Sockets) -> None:
        self._fileno: int | None = fd
        self._hear, self._sockets = hear, sockets

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        if self._fileno is None:
            return
        goes_on = False
        try:
            goes_on = self._hear()
        finally:
            if not goes_on:
                self._sockets.forget(self)  # else its end would be told for ever
                self._fileno = None

    handle_close = handle_read_event

    def handle_error(self) -> None:
        log.exception("what was heard could not be handled")  # wasyncore calls this while it handles one
