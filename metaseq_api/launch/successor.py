"""The job that takes over from a member: submitted before the member's time is over, awaited, given its place.

    half of the job's time before its end, an hour at most    the same script is submitted, as the next member
    OVERLAP_S after the next one says that it is ready        this one lets nobody new in, and ends when it has answered

Until then both serve. A next one that is not ready in time changes nothing: this one ends as it would have. Knows the
registry and one command of SLURM. Does not know who forwards requests, nor how a member ends but that SIGUSR1 says so.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metaseq_api.errors import ClusterError
from metaseq_api.launch import cluster
from metaseq_api.launch.countdown import Hooks
from metaseq_api.launch.members import find_all, successor_of
from metaseq_api.launch.registry import Registry, Submission
from metaseq_api.launch.rendezvous import outside_of_job
from metaseq_api.settings import Settings

log = logging.getLogger(__name__)

MOST_LEAD_S = 3600.0
OVERLAP_S = 10.0
"""Units: seconds that both serve: a proxy must have seen the next one before this one goes."""
LOOK_S = 1.0
"""Units: seconds between two looks into the registry."""
AGAIN_S = 30.0
"""Units: seconds between two questions to SLURM, or two attempts."""
ATTEMPTS = 3
"""Jobs that are submitted at most, where one after the other ends before it is ready."""


def hooks_of(settings: Settings, end_time: float | None, now: float | None = None) -> Hooks:
    """What a member does before its end; nothing where it is to have no successor, or has no end. Units: since 1970."""
    if settings.successor is None or settings.registry is None or settings.service is None or end_time is None:
        return Hooks()
    lead = min(max(end_time - (time.time() if now is None else now), 0.0) / 2, MOST_LEAD_S)
    succession = Succession(
        registry=Registry(settings.registry), name=settings.service, member=settings.member, replicas=settings.successor
    )
    return Hooks(at_seconds_left={lead: succession.hand_over})


def _end_this_member() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """One member's, of a service with `replicas` places."""

    registry: Registry
    name: str
    member: int
    replicas: int
    end: Callable[[], None] = _end_this_member
    sleep: Callable[[float], object] = threading.Event().wait
    environment: Callable[[], Mapping[str, str]] = outside_of_job

    def hand_over(self) -> None:
        """Submit the next job, wait until it serves, and end this one. Raises: OSError, where the service is gone."""
        for _ in range(ATTEMPTS):
            job = self._next_job()
            log.info("job %s is to take over as member %d", job, successor_of(self.member, self.replicas))
            if self._is_ready(job):
                self.sleep(OVERLAP_S)
                log.info("job %s is ready: this one ends when it has answered whom it let in", job)
                self.end()
                return
            log.warning("job %s ended before it was ready; its log tells why", job)
            self.sleep(AGAIN_S)
        log.error("%d jobs in turn ended before they were ready; this member will have no successor", ATTEMPTS)

    def _next_job(self) -> str:
        """The job that is to take over: of an earlier run of this one, before SLURM requeued it, or submitted now."""
        number = successor_of(self.member, self.replicas)
        while True:
            try:
                earlier = next((s for s in self.registry.successors(self.name) if s.member == number), None)
                if earlier is None or not self._lives(earlier.job):
                    return self._submit(number)
                if earlier.submitted > self._own().submitted:
                    return earlier.job
                log.info("job %s, whose number the next one is to have, has not ended yet", earlier.job)
            except ClusterError as e:
                log.warning("%s; it is tried again", e)
            self.sleep(AGAIN_S)

    def _submit(self, number: int) -> str:
        own = self._own()
        script = self.registry.script_file(self.name).read_text("utf-8")
        array = cluster.submit(script, [f"--array={number}"], env=self.environment())
        job = f"{array}_{number}"
        try:
            self.registry.write_successor(
                Submission(
                    name=self.name,
                    job=job,
                    model=own.model,
                    submitted=time.time(),
                    login=own.login,
                    key_file=own.key_file,
                    log=str(self.registry.log_file(self.name, job)),
                    member=number,
                )
            )
        except OSError:  # it was stopped meanwhile: nobody would find that job
            cluster.cancel(job)
            raise
        return job

    def _own(self) -> Submission:
        """What this member was submitted as. Raises: OSError where the service is not there any more."""
        found = find_all(self.registry, self.name)
        own = next((m.submission for m in found.members if m.number == self.member), None) if found else None
        if own is None:
            raise FileNotFoundError(f"{self.name} is not in the registry any more")
        return own

    def _is_ready(self, job: str) -> bool:
        """Wait for the next member; False where its job ended first."""
        asked = time.monotonic()
        while True:
            for record in self.registry.records(self.name):
                if record.job == job and record.state in ("ready", "ended"):
                    return record.state == "ready"
            if time.monotonic() - asked > AGAIN_S:
                asked = time.monotonic()
                try:
                    if not self._lives(job):
                        return False
                except ClusterError as e:
                    log.warning("%s", e)
            self.sleep(LOOK_S)

    @staticmethod
    def _lives(job: str) -> bool:
        found = cluster.jobs([job]).get(job)
        return found is not None and (found.is_queued or found.is_running)
