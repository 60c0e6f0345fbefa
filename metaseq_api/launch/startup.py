"""How long a service took from its command until it answered, and where that went.

Knows when processes began and what each lap is called. Does not know what is done in a lap. Seconds are those of the
machine's boot clock, which every process of it shares, so that a rank's first lap can begin with its supervisor.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SHOWN_S = 0.05
"""Units: seconds; what took less is part of the total and not named."""


def boot_clock() -> float:
    """Units: seconds since the machine started, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class StartUp:
    """Laps since `began`, without a gap: they add up to the whole. A name that comes again is one lap."""

    def __init__(self, began: float, clock: Callable[[], float] = boot_clock) -> None:
        self._began = self._last = began
        self._clock = clock
        self.laps: dict[str, float] = {}
        """Units: seconds, by name, in the order of their ends."""

    @classmethod
    def of_this_process(cls, *, supervised: bool) -> StartUp:
        """Two laps are over: what the door did before it started this rank, if it did, and this rank's imports."""
        own = process_began(os.getpid())
        startup = cls(process_began(os.getppid()) if supervised else own)
        if supervised:
            startup.lap("door", until=own)
        startup.lap("imports")
        return startup

    @property
    def total(self) -> float:
        return self._last - self._began

    def lap(self, name: str, *, until: float | None = None) -> None:
        """What was done since the last lap is called so. Units: until in seconds of the clock, None: now."""
        now = self._clock() if until is None else until
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    @contextlib.contextmanager
    def inside(self, name: str, around: str) -> Iterator[None]:
        """The block is a lap, or more of one, and what came before it one of `around`."""
        self.lap(around)
        yield
        self.lap(name)

    def told(self) -> str:
        """As a line of the log: `4.1 s: door 0.2, imports 1.9, ...`."""
        shown = ", ".join(f"{name} {spent:.1f}" for name, spent in self.laps.items() if spent >= SHOWN_S)
        return f"{self.total:.1f} s: {shown}"


def process_began(pid: int, proc: Path = Path("/proc")) -> float:
    """When a process was started, to a hundredth of a second; now where that cannot be read.

    Units: seconds of the boot clock. Source: proc(5), /proc/PID/stat field 22, in ticks.
    """
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return boot_clock()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
