"""The members of one service, each a job with its own word, and how they stand together.

A service of one job has one member, 0. A job array of R starts members 0 to R-1. A successor of member K is member
K + R, and the next one K again, so that of the two files each has one writer at a time; K and K + R are one *place*.
Knows the registry's submissions and records. Does not know how SLURM is asked, nor who forwards requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.launch.cluster import Job
from metaseq_api.launch.registry import Record, Registry, Submission
from metaseq_api.launch.standing import STALE_S, Standing, judge

_ORDER = ("ready", "draining", "loading", "starting", "silent", "queued", "ended")
"""Of several members' states the service's is the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member and the job it is; `submission` is None for one outside of SLURM."""

    number: int
    job: str
    log: Path
    submission: Submission | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All that the registry holds of one service."""

    name: str
    submission: Submission | None
    members: tuple[Member, ...]
    records: tuple[Record, ...]
    proxy: Record | None

    @property
    def jobs(self) -> list[str]:
        """Every job that may be one of it, the proxy's included."""
        proxy = [self.proxy.job] if self.proxy and self.proxy.job else []
        return [m.job for m in self.members if m.job] + proxy


def successor_of(member: int, replicas: int) -> int:
    """The number of whoever takes over from a member."""
    return (member + replicas) % (2 * replicas)


def find_all(registry: Registry, name: str) -> Found | None:
    """What the registry holds under a name; None where that is nothing."""
    submission, records, proxy = registry.submission(name), registry.records(name), registry.proxy(name)
    if submission is None and not records:
        return None
    members = {m.number: m for m in _first(registry, name, submission, records)}
    for s in registry.successors(name):
        log = registry.log_file(name, s.job)
        members[s.member] = Member(number=s.member, job=s.job, log=log, submission=s)
    return Found(
        name=name,
        submission=submission,
        members=tuple(members[n] for n in sorted(members)),
        records=tuple(records),
        proxy=proxy,
    )


def _first(registry: Registry, name: str, submission: Submission | None, records: Sequence[Record]) -> list[Member]:
    if submission is None:  # started without `submit`
        return [
            Member(number=r.member, job=r.job or "", log=registry.log_file(name, r.job or ""), submission=None)
            for r in records
        ]
    if not submission.replicas:
        return [Member(number=0, job=submission.job, log=Path(submission.log), submission=submission)]
    jobs = [f"{submission.job}_{n}" for n in range(submission.replicas)]
    return [
        Member(number=n, job=job, log=registry.log_file(name, job), submission=dataclasses.replace(submission, job=job))
        for n, job in enumerate(jobs)
    ]


def judge_all(found: Found, jobs: Mapping[str, Job] | None, now: float) -> Standing:
    """How a service stands. `jobs` is what SLURM says; None where it does not answer. Units: now since 1970."""
    each = [
        dataclasses.replace(
            judge(
                found.name,
                member.submission,
                [r for r in found.records if r.member == member.number],
                (jobs or {}).get(member.job),
                now,
                slurm_answers=jobs is not None,
            ),
            member=member.number,
            log=str(member.log),
        )
        for member in found.members
    ]
    return together(found, each, jobs, now)


def together(found: Found, each: Sequence[Standing], jobs: Mapping[str, Job] | None, now: float) -> Standing:
    """The service out of its members' standings."""
    replicas = max(found.submission.replicas if found.submission else 0, 1)
    living = [s for s in each if not s.has_ended]
    taken = {s.member % replicas for s in living}
    shown = [s for s in each if not s.has_ended or s.member % replicas not in taken]
    best = min(shown, key=lambda s: _ORDER.index(s.state))
    proxy = found.proxy if _is_up(found.proxy, jobs, now) else None
    if len(shown) == 1 and proxy is None and replicas == 1:
        return dataclasses.replace(best, submission=found.submission, members=tuple(shown))
    num_ready = sum(s.state == "ready" for s in shown)
    others = [f"member {s.member} {s.words}" for s in shown if s.state != "ready"]
    where = f"behind {proxy.url}" if proxy else ", ".join(s.url for s in shown if s.state == "ready")
    words = "; ".join([f"{num_ready} of {replicas} ready{f' {where}' if where else ''}", *others])
    return Standing(
        name=found.name,
        state=best.state,
        words=words,
        job=found.submission.job if found.submission else best.job,
        model=best.model,
        url=proxy.url if proxy and best.url else best.url,
        submission=found.submission,
        record=proxy if proxy and best.url else best.record,
        members=tuple(shown),
        proxy=proxy,
    )


def _is_up(proxy: Record | None, jobs: Mapping[str, Job] | None, now: float) -> bool:
    if proxy is None or proxy.state != "ready" or now - proxy.heartbeat > STALE_S:
        return False
    job = (jobs or {}).get(proxy.job or "")
    return job is None or job.is_running
