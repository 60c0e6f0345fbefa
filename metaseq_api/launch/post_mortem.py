"""A last look at a process that does not answer: its state, its stack in the log, and its end.

For ranks that no supervisor of ours stands above (srun or torchrun with one task per rank), by a rank of the same node.
Knows /proc and signals. Does not know ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from pathlib import Path

STACK_S = 0.3
"""Units: seconds that it has to write its stack."""
ASK_FOR_STACK = (signal.SIGQUIT, signal.SIGCONT, signal.SIGQUIT)
"""To one that is stopped, to its main thread: the first is pending when it goes on, or else the second comes."""
LOOKS = 10
_STATES = {
    "T": "stopped, by SIGSTOP",
    "t": "stopped, by a debugger",
    "Z": "dead",
    "X": "dead",
    "D": "held up in the kernel, by a disk or a driver",
    "R": "running",
    "S": "waiting",
}


def to_main_thread(pid: int, signum: int) -> None:
    """Signal a process's main thread, whose stack is wanted; `kill` leaves the choice of a thread to the kernel."""
    if ctypes.CDLL(None).tgkill(pid, pid, signum):
        raise ProcessLookupError(pid)


def state_of(pid: int) -> str:
    """What a process of this machine is doing, in words; "gone" where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    letter = status.rpartition(")")[2].split()[0]
    return _STATES.get(letter, f"in state {letter}")


def is_held(pid: int) -> bool:
    """Whether SIGSTOP or a debugger holds it; a profiler, which stops it for moments, does not. Takes 0.2 s if so."""
    for _ in range(LOOKS):
        if not state_of(pid).startswith("stopped"):
            return False
        threading.Event().wait(0.2 / LOOKS)
    return True


def show_stack_and_kill(pid: int) -> str:
    """Have a rank's stack in its log, continuing it for that where it is stopped, and kill it; its state before."""
    state = state_of(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for signum in ASK_FOR_STACK:
            to_main_thread(pid, signum)
        threading.Event().wait(STACK_S)
        os.kill(pid, signal.SIGKILL)
    return state
