"""Starts the ranks of one machine, waits, and ends them: all of them, whatever happens to any of them.

    start    every rank as a process of its own, which the kernel kills should this one die
    watch    until a stop signal comes (SIGINT, SIGTERM, SIGHUP) or a rank ends
    end      SIGTERM to rank 0 and `grace_s` for it to end its requests and dismiss the others; then SIGTERM to the
             rest, then SIGKILL, which also ends a stopped process. A second SIGINT is SIGKILL at once
    blame    where a rank failed: the one that failed first, not those that failed because of it

Knows processes and signals. Does not know torch, or what a rank does. Must run in the main thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from socket import socket
from types import FrameType

from metaseq_api.launch.order import Order
from metaseq_api.launch.ranks import HOST_MODULE, SETTLE_S, TERM_S, Child, kill, start, unnamed_file, verdict, weight
from metaseq_api.launch.rendezvous import Placement
from metaseq_api.settings import Settings

GRACE_S = 3.0
"""Units: seconds that rank 0 has to end its requests; with the two below it stays under the 5 s of one Ctrl-C."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Signals:
    """Stop signals that came, and a wait that every signal ends, a child's death included."""

    wakeup: int
    stops: list[int] = field(default_factory=list)

    @property
    def hurry(self) -> bool:
        return self.stops.count(signal.SIGINT) > 1

    def on_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stops.append(signum)

    def wait(self, seconds: float | None = None) -> None:
        select.select([self.wakeup], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self.wakeup, 4096)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Handle signals while the ranks live: SIGINT even where a shell's `&` had it ignored, SIGHUP not under nohup."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signals = _Signals(read)
    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {s: signal.signal(s, signals.on_stop) for s in wanted}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(old)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(read)
        os.close(write)


def supervise(
    placement: Placement,
    num_ranks: int,
    settings: Settings,
    *,
    sock: socket | None = None,
    module: str = HOST_MODULE,
    verbose: bool = False,
    grace_s: float = GRACE_S,
) -> int:
    """Run this machine's ranks out of `num_ranks` until they end or a signal ends them; no process is left on return.

    `sock`, the listening socket, goes to rank 0 and is closed here. Returns 0 after a stop that was asked for (130 if
    a second SIGINT cut it short), and where rank 0 ended with 0 by itself. Units: grace_s in seconds.
    Raises: what the rank that failed first said, with its exit code; RankFailed where it said nothing.
    """
    with _signals() as signals, contextlib.ExitStack() as files:
        children: list[Child] = []
        try:
            # closed once rank 0 has it: a connection made while rank 0 is dead must not wait for an answer
            with sock or contextlib.nullcontext():
                store = unnamed_file(files)
                for rank in placement.local_ranks(num_ranks, f"file:///proc/self/fd/{store}"):
                    order = Order(
                        settings=settings,
                        rank=rank,
                        listen_fd=sock.fileno() if sock is not None and rank.rank == 0 else None,
                        words_fd=unnamed_file(files),
                        parent_pid=os.getpid(),
                        verbose=verbose,
                    )
                    children.append(start(order, module, store))
            culprit = _watch(children, signals)
            asked = bool(signals.stops)
            _end(children, signals, grace_s, graceful=asked)
        finally:
            kill(children)
        if asked:
            return 128 + signal.SIGINT if signals.hurry else 0
        if culprit.process.returncode == 0 and (culprit.rank.rank == 0 or _all_well(children)):
            return 0
        raise verdict(culprit)


def _watch(children: Sequence[Child], signals: _Signals) -> Child:
    """Wait for a stop signal, or a rank's end and whom to blame for it; the first child where nobody failed."""
    while not signals.stops and all(c.alive for c in children):
        signals.wait()
    deadline = time.monotonic() + SETTLE_S
    while not signals.stops and (left := deadline - time.monotonic()) > 0:
        ended = [c for c in children if not c.alive]
        if any(weight(c) == 3 for c in ended) or len(ended) == len(children):
            break
        signals.wait(left)
    return max(children, key=weight)


def _end(children: Sequence[Child], signals: _Signals, grace_s: float, *, graceful: bool) -> None:
    """End every child; where `graceful`, rank 0 first, so that it may dismiss the others itself."""
    head = [c for c in children if c.rank.rank == 0]
    for child in head if graceful else children:
        child.send(signal.SIGTERM)
    if graceful:
        _await(head or children, signals, grace_s)
        _await(children, signals, TERM_S)
        for child in children:
            child.send(signal.SIGTERM)
        _await(children, signals, TERM_S)
    else:
        _await(children, signals, grace_s)
    for child in children:
        if child.alive and not signals.hurry:
            logger.warning("%s did not end in time and is killed", child.name)


def _await(children: Sequence[Child], signals: _Signals, seconds: float) -> None:
    """Wait until these children have ended, at most `seconds`; a second SIGINT cuts it short."""
    deadline = time.monotonic() + seconds
    while any(c.alive for c in children) and not signals.hurry and (left := deadline - time.monotonic()) > 0:
        signals.wait(left)


def _all_well(children: Sequence[Child]) -> bool:
    return all(c.process.returncode == 0 for c in children)
