"""The ranks of this machine as processes: starting one, and telling from their ends which failed first.

Knows processes, and the words a rank ends by. Does not know when to start or end them: `supervisor` does for a service,
`followers` for a rank 0 that is this process.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from metaseq_api import errors
from metaseq_api.errors import MetaseqApiError, RankFailed, ResourceError
from metaseq_api.launch.order import Order, read_last_words
from metaseq_api.launch.post_mortem import ASK_FOR_STACK, is_held, to_main_thread
from metaseq_api.launch.rendezvous import RankInfo

HOST_MODULE = "metaseq_api.host"
TERM_S = 0.7
"""Units: seconds between SIGTERM and SIGKILL."""
SETTLE_S = 0.5
"""Units: seconds to wait for the true culprit where the first rank to fail may only have lost another."""
_OWN_CODES = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MetaseqApiError)}
# how a rank ends when another one has vanished, or when it was told to
_CONSEQUENCES = {0, RankFailed.exit_code, *(-s for s in (signal.SIGABRT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))}


@dataclass(frozen=True, slots=True)
class Child:
    """One rank's process, and the file it leaves its last words in."""

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
        return ending(self.process.returncode)

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP, or a debugger, holds it."""
        return is_held(self.process.pid)

    def send(self, signum: int) -> None:
        if self.alive and signum in ASK_FOR_STACK:
            to_main_thread(self.process.pid, signum)
        elif self.alive:
            self.process.send_signal(signum)


def unnamed_file(files: contextlib.ExitStack) -> int:
    """A file for children to inherit that has no name, so that nothing is left of it even where all are killed."""
    try:
        return files.enter_context(tempfile.TemporaryFile()).fileno()
    except OSError as e:
        raise ResourceError(f"cannot make a temporary file: {e.strerror}; point TMPDIR to a folder with room") from e


def ending(code: int) -> str:
    """How a process ended, in words, by its return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    out_of_memory = " (by hand, or by the kernel or SLURM for want of memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{out_of_memory}"


def spawn(
    argv: Sequence[str],
    order: str,
    inherited: Sequence[int],
    held_back: frozenset[signal.Signals] = frozenset({signal.SIGINT}),
) -> subprocess.Popen[bytes]:
    """Start a process that reads its order from standard input, with signals blocked that it will unblock.

    Raises: OSError.
    """
    # across the exec: a Ctrl-C in the terminal must not reach a child that cannot ignore it yet
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=inherited)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # it is dead already, as whoever watches it will find
        process.stdin.write(order.encode())
        process.stdin.close()
    return process


def start(order: Order, module: str, store: int) -> Child:
    """Start the rank that `order` says; it dies with the thread that calls this. Raises: ResourceError."""
    rank = order.rank
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    argv = [sys.executable, *safe_path, "-m", "metaseq_api.launch.child", module, f"rank{rank.rank}/{rank.world_size}"]
    inherited = [store, order.words_fd, *([] if order.listen_fd is None else [order.listen_fd])]
    try:
        process = spawn(argv, order.to_json(), inherited)
    except OSError as e:
        raise ResourceError(f"cannot start rank {rank.rank}: {e.strerror}; this machine is short of processes") from e
    return Child(rank, process, order.words_fd)


def weight(child: Child) -> int:
    """How surely a child's end is the cause of the others' and not its consequence."""
    code = child.process.poll()
    if code is None:
        return -1
    if code in _CONSEQUENCES:
        return 1 if code else 0
    return 3 if code < 0 or read_last_words(child.words_fd) else 2


def kill(children: Sequence[Child]) -> None:
    """End at once what still lives."""
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one stuck in a driver dies when the driver lets go
            child.process.wait(timeout=1)


def verdict(culprit: Child) -> MetaseqApiError:
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
