"""Whose word counts, the service's or SLURM's: the table of standing.py, row by row."""

from __future__ import annotations

import time

import pytest

from metaseq_api.launch.cluster import Job
from metaseq_api.launch.registry import Record, Submission
from metaseq_api.launch.standing import STALE_S, judge

NOW = 1_795_000_000.0
SUBMISSION = Submission(name="a", job="17", model="/data/opt", submitted=NOW - 100)
RUNNING = Job(id="17", state="RUNNING", nodes="gpu07")
PENDING = Job(id="17", state="PENDING", reason="Priority")


def record(state: str, age: float = 1, job: str = "17", reason: str = "", code: int | None = None) -> Record:
    return Record(
        name="a",
        state=state,
        heartbeat=NOW - age,
        job=job,
        node="gpu07",
        url="http://gpu07:6010",
        percent=50,
        rate=2e9,
        reason=reason,
        exit_code=code,
    )


@pytest.mark.parametrize(
    ("found", "job", "answers", "state", "words"),
    [
        (None, PENDING, True, "queued", "queued: other jobs come first (Priority)"),
        (record("ready"), PENDING, True, "queued", "queued: other jobs come first (Priority)"),
        (None, RUNNING, True, "starting", "running on gpu07; the service has not said anything yet"),
        (record("starting"), RUNNING, True, "starting", "starting on gpu07"),
        (record("loading"), RUNNING, True, "loading", "loading on gpu07: 50 % at 2.00 GB/s a rank"),
        (record("ready"), RUNNING, True, "ready", "ready on http://gpu07:6010"),
        (record("draining", reason="time limit"), RUNNING, True, "draining", "takes no new requests (time limit)"),
        (record("warming"), RUNNING, True, "starting", "warming on gpu07"),
        (
            record("ready", age=90),
            RUNNING,
            True,
            "silent",
            "has said nothing for 90 s (then: ready on http://gpu07:6010)",
        ),
        (record("ended", reason="cut short", code=4), RUNNING, True, "ended", "cut short (exit code 4)"),
        (record("ready"), Job(id="17", state="TIMEOUT"), True, "ended", "its job reached its time limit"),
        (record("ready"), Job(id="17", state="NODE_FAIL"), True, "ended", "a node of its job failed"),
        (record("ended", reason="x"), Job(id="17", state="FAILED"), True, "ended", "; the service's last word: x"),
        (
            record("ready", age=90),
            None,
            True,
            "ended",
            "SLURM no longer knows its job, and the service has said nothing",
        ),
        (None, None, True, "ended", "SLURM no longer knows its job, and the service has not said anything yet"),
        (record("ready"), None, True, "ready", "; SLURM does not know a job of it"),
        (record("ready"), None, False, "ready", "; SLURM does not answer"),
        (record("ready", age=90), None, False, "silent", "SLURM does not answer: see `scontrol ping`"),
        (None, None, False, "silent", "SLURM does not answer: see `scontrol ping`"),
        (record("ready", job="16"), RUNNING, True, "starting", "has not said anything yet"),
    ],
)
def test_the_word_that_counts(found: Record | None, job: Job | None, answers: bool, state: str, words: str) -> None:
    standing = judge("a", SUBMISSION, [found] if found else [], job, NOW, slurm_answers=answers)
    assert standing.state == state
    assert words in standing.words
    assert standing.job == "17"
    assert bool(standing.url) is (state in ("ready", "draining", "silent") and found is not None)


def test_a_record_from_before_the_job_began_again_is_not_believed() -> None:
    def began(before: float) -> Job:
        return Job(
            id="17", state="RUNNING", nodes="x", start=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW - before))
        )

    assert judge("a", SUBMISSION, [record("ready", age=10)], began(5), NOW).state == "starting"
    assert judge("a", SUBMISSION, [record("ended", age=10)], began(5), NOW).state == "starting"
    assert judge("a", SUBMISSION, [record("ready", age=10)], began(20), NOW).state == "ready"


def test_silence_begins_after_a_while_only() -> None:
    assert judge("a", SUBMISSION, [record("ready", age=STALE_S - 1)], RUNNING, NOW).state == "ready"
    assert judge("a", SUBMISSION, [record("ready", age=STALE_S + 1)], RUNNING, NOW).state == "silent"


def test_of_several_members_the_one_that_answers_counts() -> None:
    standing = judge("a", SUBMISSION, [record("loading"), record("ready"), record("draining")], RUNNING, NOW)
    assert standing.state == "ready"
    assert standing.record
    assert standing.record.state == "ready"
