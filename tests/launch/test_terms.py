"""What each signal gives running requests: numbers in, numbers out. SLURM's answers are those of 22.05."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest

from metaseq_api.launch.rendezvous import Job
from metaseq_api.launch.terms import (
    AGAIN_S,
    GRACE_S,
    INTERRUPT_S,
    Deadline,
    Terms,
    ask,
    parse_end_time,
    parse_kill_wait,
)

NOW = 1_000_000.0
INT, TERM, HUP, USR1, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
SLURM = Terms(kill_wait_s=30.0, end_time=NOW + 120)


@pytest.mark.parametrize(
    ("terms", "signum", "seconds"),
    [
        (Terms(), TERM, GRACE_S),
        (Terms(), USR1, GRACE_S),
        (Terms(), INT, INTERRUPT_S),
        (Terms(grace_s=1.0), INT, 1.0),
        (Terms(grace_s=300.0), HUP, 300.0),
        (SLURM, TERM, 27.0),
        (SLURM, USR1, 120.0),
        (SLURM, USR2, 120.0),
        (SLURM, INT, INTERRUPT_S),
        (Terms(kill_wait_s=30.0, end_time=NOW + 5), USR1, 27.0),  # KillWait begins at the job's end
        (Terms(kill_wait_s=30.0), USR1, GRACE_S),  # no limit, so a hand sent it
        (Terms(kill_wait_s=3.0), TERM, 1.5),
        (Terms(kill_wait_s=30.0, end_time=NOW + 120, grace_s=60.0), USR1, 60.0),
        (Terms(kill_wait_s=30.0, grace_s=0.0), TERM, 0.0),
    ],
)
def test_a_signal_gives_what_is_left(terms: Terms, signum: signal.Signals, seconds: float) -> None:
    assert terms.seconds(signum, NOW) == seconds


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def deadline(terms: Terms) -> tuple[Deadline, Clock]:
    clock = Clock()
    return Deadline(terms, clock=clock, wall=lambda: NOW), clock


def test_a_later_signal_only_shortens() -> None:
    end, clock = deadline(SLURM)
    assert end.hear(USR1) == 170.0
    assert end.hear(TERM) == 77.0  # the limit came sooner than was said
    assert end.hear(USR1) == 77.0
    clock.now = 70.0
    assert end.hear(INT) == 72.0
    clock.now = 80.0
    assert end.left_s == 0.0


def test_the_same_signal_from_many_senders_is_one_and_from_an_impatient_one_is_ctrl_c() -> None:
    end, clock = deadline(Terms())
    end.hear(TERM)
    clock.now += AGAIN_S / 2
    assert end.hear(TERM) == 50.0 + GRACE_S
    clock.now += AGAIN_S
    assert end.hear(TERM) == clock.now + INTERRUPT_S


def test_under_slurm_the_same_signal_again_changes_nothing() -> None:
    end, clock = deadline(SLURM)
    end.hear(TERM)
    clock.now += 10
    assert end.hear(TERM) == 77.0


SHOWN_JOB = "JobId=2 JobName=x\n   StartTime=2026-11-20T17:40:33 EndTime=2026-11-20T17:45:33 Deadline=N/A\n"
SHOWN_CONFIG = (
    "KeepAliveTime           = SYSTEM_DEFAULT\nKillOnBadExit           = 0\nKillWait                = 45 sec\n"
)


def test_scontrols_answers_are_read() -> None:
    later = SHOWN_JOB.replace("17:45:33", "17:46:33")
    first, second = parse_end_time(SHOWN_JOB), parse_end_time(later)
    assert first
    assert second
    assert second - first == 60
    assert parse_end_time(f"RunTime=00:01:00 TimeLimit=UNLIMITED TimeMin=N/A\n{SHOWN_JOB}") is None
    assert parse_end_time("EndTime=Unknown") is None
    assert parse_end_time("") is None
    assert parse_kill_wait(SHOWN_CONFIG) == 45.0
    assert parse_kill_wait("") == 30.0


def test_scontrol_is_asked_for_what_the_environment_does_not_say_and_never_outside_slurm() -> None:
    asked: list[Sequence[str]] = []

    def run(argv: Sequence[str]) -> str | None:
        asked.append(argv)
        return SHOWN_CONFIG if argv[2] == "config" else SHOWN_JOB

    assert ask(None, 7.0, run) == Terms(grace_s=7.0)
    assert asked == []
    assert ask(Job(job_id="2", end_time=NOW), None, run) == Terms(kill_wait_s=45.0, end_time=NOW)
    assert len(asked) == 1
    assert ask(Job(job_id="2"), None, run).end_time == parse_end_time(SHOWN_JOB)
    assert ask(Job(job_id="2"), None, lambda argv: None) == Terms(kill_wait_s=30.0)
