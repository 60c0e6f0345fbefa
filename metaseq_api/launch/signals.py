"""Signals as they come, for one thread to wait for.

They are written to a pipe by the C handler itself, so that a thread which reads it hears them at once, even while the
main thread is held up in a collective. Knows handlers. Does not know what a signal means.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What ends a service. SIGHUP only where it is not ignored, as under nohup."""


class Signals:
    """Stop signals in the order they came; `others` (SIGCHLD, SIGQUIT) end a wait too and are kept apart."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self.stops: list[int] = []
        self.others: list[int] = []

    @property
    def hurry(self) -> bool:
        """Whether Ctrl-C was pressed twice."""
        return self.stops.count(signal.SIGINT) > 1

    def wait(self, seconds: float | None = None) -> None:
        """Return when a signal has come, `wake` was called, or the time is over. Units: seconds."""
        select.select([self._read], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            for signum in os.read(self._read, 4096):
                if signum:
                    (self.stops if signum in STOPS else self.others).append(signum)

    def wake(self) -> None:
        """End a wait of another thread."""
        with contextlib.suppress(BlockingIOError):  # full: it has enough to wake up for
            os.write(self._write, b"\0")


@contextlib.contextmanager
def heard(*others: signal.Signals) -> Iterator[Signals]:
    """Hear the stop signals and `others` while the context lasts: SIGINT even where a shell's `&` had it ignored.

    Must be entered in the main thread.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    wanted = [s for s in STOPS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {s: signal.signal(s, lambda *_: None) for s in (*wanted, *others)}
    try:
        yield Signals(read, write)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(old)
        os.close(read)
        os.close(write)
