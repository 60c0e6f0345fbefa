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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from socket import socket
from types import FrameType

from metaseq_api import errors
from metaseq_api.errors import MetaseqApiError, RankFailed, ResourceError
from metaseq_api.launch.order import Order, read_last_words
from metaseq_api.launch.rendezvous import Placement, RankInfo
from metaseq_api.settings import Settings

HOST_MODULE = "metaseq_api.host"
GRACE_S = 3.0
"""Units: seconds that rank 0 has to end its requests; with the two below it stays under the 5 s of one Ctrl-C."""
TERM_S = 0.7
"""Units: seconds between SIGTERM and SIGKILL."""
SETTLE_S = 0.5
"""Units: seconds to wait for the true culprit where the first rank to fail may only have lost another."""
_OWN_CODES = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MetaseqApiError)}
# how a rank ends when another one has vanished, or when it was told to
_CONSEQUENCES = {0, RankFailed.exit_code, *(-s for s in (signal.SIGABRT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Child:
    rank: RankInfo
    process: subprocess.Popen[bytes]
    words_fd: int

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def name(self) -> str:
        return f"rank {self.rank.rank} of {self.rank.world_size} (pid {self.process.pid} on {self.rank.node})"

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal
            name = f"signal {-code}"
        out_of_memory = " (by hand, or by the kernel or SLURM for want of memory)" if name == "SIGKILL" else ""
        return f"was killed by {name}{out_of_memory}"

    def send(self, signum: int) -> None:
        if self.alive:
            self.process.send_signal(signum)


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
        children: list[_Child] = []
        try:
            # closed once rank 0 has it: a connection made while rank 0 is dead must not wait for an answer
            with sock or contextlib.nullcontext():
                store = _unnamed_file(files)
                for rank in placement.local_ranks(num_ranks, f"file:///proc/self/fd/{store}"):
                    order = Order(
                        settings=settings,
                        rank=rank,
                        listen_fd=sock.fileno() if sock is not None and rank.rank == 0 else None,
                        words_fd=_unnamed_file(files),
                        parent_pid=os.getpid(),
                        verbose=verbose,
                    )
                    children.append(_start(order, module, store))
            culprit = _watch(children, signals)
            asked = bool(signals.stops)
            _end(children, signals, grace_s, graceful=asked)
        finally:
            _kill(children)
        if asked:
            return 128 + signal.SIGINT if signals.hurry else 0
        if culprit.process.returncode == 0 and (culprit.rank.rank == 0 or _all_well(children)):
            return 0
        raise _verdict(culprit)


def _unnamed_file(files: contextlib.ExitStack) -> int:
    """A file for children to inherit that has no name, so that nothing is left of it even where all are killed."""
    try:
        return files.enter_context(tempfile.TemporaryFile()).fileno()
    except OSError as e:
        raise ResourceError(f"cannot make a temporary file: {e.strerror}; point TMPDIR to a folder with room") from e


def _start(order: Order, module: str, store: int) -> _Child:
    rank = order.rank
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    argv = [sys.executable, *safe_path, "-m", "metaseq_api.launch.child", module, f"rank{rank.rank}/{rank.world_size}"]
    inherited = [store, order.words_fd, *([] if order.listen_fd is None else [order.listen_fd])]
    # blocked across the exec: a Ctrl-C in the terminal must not reach a child that cannot ignore it yet
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=inherited)
    except OSError as e:
        raise ResourceError(f"cannot start rank {rank.rank}: {e.strerror}; this machine is short of processes") from e
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # it is dead already, as the watch will find
        process.stdin.write(order.to_json().encode())
        process.stdin.close()
    return _Child(rank, process, order.words_fd)


def _watch(children: Sequence[_Child], signals: _Signals) -> _Child:
    """Wait for a stop signal, or a rank's end and whom to blame for it; the first child where nobody failed."""
    while not signals.stops and all(c.alive for c in children):
        signals.wait()
    deadline = time.monotonic() + SETTLE_S
    while not signals.stops and (left := deadline - time.monotonic()) > 0:
        ended = [c for c in children if not c.alive]
        if any(_weight(c) == 3 for c in ended) or len(ended) == len(children):
            break
        signals.wait(left)
    return max(children, key=_weight)


def _weight(child: _Child) -> int:
    """How surely a child's end is the cause of the others' and not its consequence."""
    code = child.process.poll()
    if code is None:
        return -1
    if code in _CONSEQUENCES:
        return 1 if code else 0
    return 3 if code < 0 or read_last_words(child.words_fd) else 2


def _end(children: Sequence[_Child], signals: _Signals, grace_s: float, *, graceful: bool) -> None:
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


def _await(children: Sequence[_Child], signals: _Signals, seconds: float) -> None:
    """Wait until these children have ended, at most `seconds`; a second SIGINT cuts it short."""
    deadline = time.monotonic() + seconds
    while any(c.alive for c in children) and not signals.hurry and (left := deadline - time.monotonic()) > 0:
        signals.wait(left)


def _kill(children: Sequence[_Child]) -> None:
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one stuck in a driver dies when the driver lets go
            child.process.wait(timeout=1)


def _all_well(children: Sequence[_Child]) -> bool:
    return all(c.process.returncode == 0 for c in children)


def _verdict(culprit: _Child) -> MetaseqApiError:
    """The error of the rank that failed first, to be printed last, after whatever the others wrote."""
    rank, code, words = culprit.rank, culprit.process.returncode, read_last_words(culprit.words_fd)
    if words is not None:
        where = f" (rank {rank.rank} of {rank.world_size} on {rank.node})" if rank.world_size > 1 else ""
        error = MetaseqApiError(f"{words}{where}")
    else:
        hint = "; its stack is above" if code == MetaseqApiError.exit_code else ""
        error = RankFailed(f"{culprit.name} {culprit.ending}{hint}")
    error.exit_code = code if code in _OWN_CODES else RankFailed.exit_code
    return error
