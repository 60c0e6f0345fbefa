"""How a service stands, from its own word and SLURM's: which of the two to believe, and what to tell a person.

Knows both words. Does not know where they are written or how SLURM is asked. The rules, in order:

    SLURM: queued               queued, whatever an earlier run (a requeue) left in the record
    SLURM: ended                ended, with SLURM's reason; the service's own last word is added where it left one
    SLURM: running              what the record says, if it is of this run and fresh; else that it says nothing
                                (one last written before the job began is of a run before a requeue)
    SLURM does not know it      ended, if the record is old; a service outside of SLURM, if it is fresh
    SLURM does not answer       what the record says, and that SLURM does not answer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metaseq_api.launch.cluster import Job
from metaseq_api.launch.registry import Record, Submission

STALE_S = 45.0
"""Units: seconds without a sign of life after which it is said; shared folders show a write some seconds late."""
_ORDER = ("ready", "loading", "starting", "draining")

State = Literal["queued", "starting", "loading", "ready", "draining", "silent", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One service now."""

    name: str
    state: str
    words: str
    job: str = ""
    model: str = ""
    url: str = ""
    submission: Submission | None = None
    record: Record | None = None
    member: int = 0
    log: str = ""
    members: tuple[Standing, ...] = ()
    """Of a whole service: how each of its members stands."""
    proxy: Record | None = None
    """Of a whole service: the proxy in front of it, while that runs."""

    @property
    def has_ended(self) -> bool:
        return self.state == "ended"


def judge(
    name: str,
    submission: Submission | None,
    records: Sequence[Record],
    job: Job | None,
    now: float,
    *,
    slurm_answers: bool = True,
) -> Standing:
    """How the service of this name stands. Units: now in seconds since 1970."""
    number = submission.job if submission else next((r.job for r in records if r.job), "") or ""
    mine = [r for r in records if not submission or r.job in (None, submission.job)]
    record = min(mine, key=lambda r: _ORDER.index(r.state) if r.state in _ORDER else len(_ORDER), default=None)
    if record and job and job.is_running and record.heartbeat < (job.began or 0.0):
        record = None
    state, words = _judge(record, job, now, slurm_answers)
    return Standing(
        name=name,
        state=state,
        words=words,
        job=number,
        model=record.model if record else submission.model if submission else "",
        url=record.url if record and state in ("ready", "draining", "silent") else "",
        submission=submission,
        record=record,
    )


def _judge(record: Record | None, job: Job | None, now: float, slurm_answers: bool) -> tuple[State, str]:
    age = now - record.heartbeat if record else 0.0
    if job is not None and job.is_queued:
        return "queued", job.words
    if job is not None and not job.is_running:
        own = (
            f"; the service's last word: {record.reason}"
            if record and record.state == "ended" and record.reason
            else ""
        )
        return "ended", job.words + own
    if record is not None and record.state == "ended":
        code = "" if not record.exit_code else f" (exit code {record.exit_code})"
        return "ended", f"{record.reason}{code}"
    fresh = record is not None and age < STALE_S
    silence = "has not said anything yet" if record is None else f"has said nothing for {age:.0f} s"
    if not slurm_answers:
        if record is not None and fresh:
            return _state(record), f"{record_words(record)}; SLURM does not answer"
        return "silent", f"the service {silence}, and SLURM does not answer: see `scontrol ping`"
    if job is None:
        if record is not None and fresh:
            return _state(record), f"{record_words(record)}; SLURM does not know a job of it"
        return "ended", f"SLURM no longer knows its job, and the service {silence}: its log tells more"
    if record is None:
        return "starting", f"{job.words}; the service {silence}"
    if fresh:
        return _state(record), record_words(record)
    return "silent", (
        f"SLURM says {job.words}, but the service {silence} (then: {record_words(record)}): it hangs, or its node "
        "does not reach the registry; see its log"
    )


def _state(record: Record) -> State:
    known: dict[str, State] = {"loading": "loading", "ready": "ready", "draining": "draining"}
    return known.get(record.state, "starting")


def record_words(record: Record) -> str:
    """A record's state for a person."""
    where = f" on {record.node}" if record.node else ""
    if record.state == "loading":
        return f"loading{where}: {record.percent:.0f} % at {record.rate / 1e9:.2f} GB/s a rank"
    if record.state == "ready":
        return f"ready on {record.url}"
    if record.state == "draining":
        return f"draining{where}: takes no new requests" + (f" ({record.reason})" if record.reason else "")
    return f"{record.state}{where}"
