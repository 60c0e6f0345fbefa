"""How long running requests may go on once a signal has come, and what SLURM says of that.

    SIGINT             INTERRUPT_S; a person waits
    SIGTERM, SIGHUP    until SLURM kills: KillWait, less what the end itself takes; outside SLURM GRACE_S
    SIGUSR1, SIGUSR2   until the job's end, which `sbatch --signal=B:USR1@120` announces; outside SLURM GRACE_S

GRACE_S, where the operator set it, bounds them all. A later signal only ever shortens what an earlier one gave.
Knows numbers, and two answers of scontrol. Does not know who handles the signals, or what a request is.
"""

from __future__ import annotations

import datetime
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metaseq_api.launch.rendezvous import Job

INTERRUPT_S = 2.0
GRACE_S = 30.0
"""Units: seconds; what a service outside SLURM has where the operator did not say."""
KILL_WAIT_S = 30.0
"""Units: seconds; SLURM's own default, for where it cannot be asked."""
MARGIN_S = 3.0
"""Units: seconds of KillWait that are kept for the last words and for every process to end."""
AGAIN_S = 1.0
"""Units: seconds within which the same signal, sent by several (srun, slurmd, a supervisor), is one."""
_ASK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is known beforehand of this service's end. Units: seconds; end_time of the epoch."""

    grace_s: float | None = None
    kill_wait_s: float | None = None
    """None outside SLURM."""
    end_time: float | None = None
    """None where the job has no limit, or there is no job."""

    def seconds(self, signum: int, now: float) -> float:
        """How long running requests may go on after this signal. Units: now in seconds of the epoch."""
        most = GRACE_S if self.grace_s is None else self.grace_s
        if signum == signal.SIGINT:
            return min(INTERRUPT_S, most)
        if self.kill_wait_s is None:
            return most
        left = self.kill_wait_s - min(MARGIN_S, self.kill_wait_s / 2)
        if signum in (signal.SIGUSR1, signal.SIGUSR2):
            left = most if self.end_time is None else max(left, self.end_time - now)
        return left if self.grace_s is None else min(left, self.grace_s)


class Deadline:
    """When running requests end at the latest, by all the signals that came so far."""

    def __init__(
        self,
        terms: Terms,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._terms, self._clock, self._wall = terms, clock, wall
        self._first: dict[int, float] = {}
        self.at: float | None = None
        """Units: seconds of `clock`; None before the first signal."""

    @property
    def left_s(self) -> float:
        return max((self.at or 0.0) - self._clock(), 0.0)

    def hear(self, signum: int) -> float:
        """Take a signal in; returns the deadline, which it may have shortened.

        Outside SLURM a second SIGTERM, by the impatience of whoever sent the first, means what SIGINT does.
        """
        now = self._clock()
        again = now - self._first.setdefault(signum, now) > AGAIN_S and self._terms.kill_wait_s is None
        given = now + self._terms.seconds(signal.SIGINT if again else signum, self._wall())
        self.at = given if self.at is None else min(self.at, given)
        return self.at


def ask(job: Job | None, grace_s: float | None, run: Callable[[Sequence[str]], str | None] | None = None) -> Terms:
    """The terms of a service in this job, or in none; what SLURM cannot be asked about has SLURM's default."""
    if job is None:
        return Terms(grace_s=grace_s)
    run = run or _output
    end_time = job.end_time
    if end_time is None:
        end_time = parse_end_time(run(["scontrol", "show", "job", job.job_id]) or "")
    kill_wait_s = parse_kill_wait(run(["scontrol", "show", "config"]) or "")
    return Terms(grace_s=grace_s, kill_wait_s=kill_wait_s, end_time=end_time)


def parse_end_time(text: str) -> float | None:
    """EndTime of `scontrol show job`, in seconds of the epoch; None where the job has no limit."""
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", text)
    unlimited = re.search(r"\bTimeLimit=UNLIMITED\b", text)
    return None if unlimited or not found else datetime.datetime.fromisoformat(found[1]).timestamp()


def parse_kill_wait(text: str) -> float:
    """KillWait of `scontrol show config`, in seconds."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", text, re.MULTILINE)
    return float(found[1]) if found else KILL_WAIT_S


def _output(argv: Sequence[str]) -> str | None:
    """What a command of SLURM's says, with times as it writes them by itself; None where it cannot say anything."""
    try:
        standard = ["env", "SLURM_TIME_FORMAT=standard", *argv]
        done = subprocess.run(standard, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
