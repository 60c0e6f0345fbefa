"""What ends a service listens for as long as it must, and not beyond."""

from __future__ import annotations

import threading

from metaseq_api.launch.drain import Drain
from metaseq_api.launch.signals import Signals, heard
from metaseq_api.launch.terms import Deadline, Terms


class Engine:
    """One that has ended by itself. Not a real one: that would take a model."""

    ended = True

    def end_by(self, deadline: float) -> int:
        return 0


class Server:
    def hang_up(self) -> None: ...

    def stop(self, grace_s: float) -> None: ...


def test_nobody_listens_any_more_when_it_has_let_go() -> None:
    may_read = threading.Event()

    class Slow(Signals):
        def wait(self, seconds: float | None = None) -> None:
            may_read.wait()
            super().wait(seconds)

    with heard() as signals:
        slow = Slow(signals._read, signals._write)
        drain = Drain(Engine(), Server(), Deadline(Terms()), slow)
        drain.start()
        signals.wake()
        waiter = threading.Thread(target=drain.let_go)
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()  # it may not go on yet
        may_read.set()
        waiter.join(10)
        assert not waiter.is_alive()
    drain.join(10)
    assert not drain.is_alive()
