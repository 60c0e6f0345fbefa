"""A service's life as seen from a login node: waited for, found again, stopped (`submit` is how it begins).

Knows the registry and SLURM, and brings their words together. Does not know the model, nor how anything is shown.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.errors import ClusterError, ServiceError
from metaseq_api.launch import cluster
from metaseq_api.launch.cluster import Job
from metaseq_api.launch.members import find_all, judge_all
from metaseq_api.launch.registry import Registry
from metaseq_api.launch.standing import Standing

POLL_S = 0.5
"""Units: seconds between two looks into the registry, which costs the cluster nothing."""
SQUEUE_S = (1.0, 10.0)
"""Units: seconds between two questions to SLURM, at first and in the end: its controller serves everybody."""
GONE_S = 60.0
"""Units: seconds that a cancelled job has to be gone: SLURM's KillWait is 30 by default."""


@dataclass(slots=True)
class Slurm:
    """What SLURM last said of some jobs, asked again only so often."""

    clock: Callable[[], float] = time.monotonic
    pause_s: float = SQUEUE_S[0]
    asked: float | None = None
    said: dict[str, Job] | None = None

    def jobs(self, ids: list[str]) -> Mapping[str, Job] | None:
        """These jobs; None where SLURM does not answer."""
        if self.asked is None or self.clock() - self.asked >= self.pause_s:
            if self.asked is not None:
                self.pause_s = min(self.pause_s * 1.2, SQUEUE_S[1])
            try:
                self.said = cluster.jobs(ids)
            except ClusterError:
                self.said = None
            self.asked = self.clock()
        return self.said


def find(registry: Registry, name: str, slurm: Slurm | None = None) -> Standing | None:
    """How the service of this name stands; None where there is none."""
    now, found = time.time(), find_all(registry, name)
    if found is None:
        return None
    return judge_all(found, (slurm or Slurm()).jobs(found.jobs), now)  # which may take a minute to say nothing


def look(registry: Registry, name: str, slurm: Slurm | None = None) -> Standing:
    """How the service of this name stands. Raises: ServiceError where there is none."""
    standing = find(registry, name, slurm)
    if standing is None:
        known = ", ".join(registry.names()) or "none"
        raise ServiceError(f"there is no service {name} in {registry.folder}; there are: {known}")
    return standing


def look_at_all(registry: Registry) -> list[Standing]:
    """How every service stands, SLURM being asked once."""
    now, found = time.time(), [f for name in registry.names() if (f := find_all(registry, name))]
    jobs = Slurm().jobs([job for f in found for job in f.jobs])
    return [judge_all(f, jobs, now) for f in found]


def follow(
    registry: Registry, name: str, *, sleep: Callable[[float], None] = time.sleep, poll_s: float = POLL_S
) -> Iterator[Standing]:
    """How a service stands, again and again, until it is ready or has ended. Raises: ServiceError."""
    slurm = Slurm()
    while True:
        standing = look(registry, name, slurm)
        yield standing
        if standing.state in ("ready", "ended"):
            return
        sleep(poll_s)


def stop(registry: Registry, name: str, *, sleep: Callable[[float], None] = time.sleep) -> Standing:
    """End a service and forget it, but for its logs; how it stood before. Returns once its jobs are gone.

    Raises: ServiceError where there is none, or SLURM has no hold on it; ClusterError.
    """
    before = look(registry, name)
    if not before.job and not before.has_ended:
        node = before.record.node if before.record else "?"
        raise ServiceError(f"{name} runs on {node} outside of SLURM: end it where it was started, with Ctrl-C")
    deadline = time.monotonic() + GONE_S
    cancelled: set[str] = set()
    while left := _living(registry, name):  # looked for anew each time: a member may have submitted its successor
        for job in left:
            if job.id not in cancelled:
                cluster.cancel(job.id)
                cancelled.add(job.id)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"job {left[0].id} was cancelled {GONE_S:.0f} s ago and is {left[0].words}; look again later"
            )
        sleep(POLL_S)
    registry.forget(name)
    return before


def _living(registry: Registry, name: str) -> list[Job]:
    """Its jobs that have not ended; the proxy's only once it is the last, for members end their streams through it."""
    found = find_all(registry, name)
    if found is None:
        return []
    living = [j for j in cluster.jobs(found.jobs).values() if j.is_queued or j.is_running]
    return [j for j in living if found.proxy is None or j.id != found.proxy.job] or living


def curl_line(standing: Standing) -> str:
    """A request to paste into a shell that sees the registry; the key itself is not in it."""
    key_file = standing.submission.key_file if standing.submission else None
    key = f' -H "Authorization: Bearer $(cat {shlex.quote(key_file)})"' if key_file else ""
    prompt = '{"prompt": "Paris is the capital of France and", "max_tokens": 32, "temperature": 0}'
    return f"curl {standing.url}/v1/completions -H 'Content-Type: application/json'{key} -d '{prompt}'"


def ssh_line(standing: Standing, user: str, local_port: int = 6010) -> str:
    """What makes a service answer on 127.0.0.1 of the user's own machine."""
    record = standing.record
    assert record is not None
    login = f"{user}@{standing.submission.login if standing.submission else socket.getfqdn()}"
    if record.host.startswith("127.") or record.host == "::1":  # nobody but its own node reaches it
        return f"ssh -N -J {login} -L {local_port}:127.0.0.1:{record.port} {user}@{record.node}"
    host = f"[{record.host}]" if ":" in record.host else record.host
    return f"ssh -N -L {local_port}:{host}:{record.port} {login}"


def log_files(standing: Standing, member: int | None = None) -> list[Path]:
    """Where a service's output is, of one member or of all. Raises: ServiceError where there is none yet."""
    if member is not None and member not in [s.member for s in standing.members]:
        has = ", ".join(str(s.member) for s in standing.members)
        raise ServiceError(f"{standing.name} has no member {member}; it has {has}")
    wanted = [s for s in standing.members if member in (None, s.member)]
    found = [path for s in wanted if (path := Path(s.log)).exists()]
    if not found:
        raise ServiceError(f"{standing.name} has written no log yet ({standing.words}); look again later")
    return found


def last_error(standing: Standing) -> str:
    """The last error in a service's log, for one that ended before it could keep a record; "" where there is none."""
    if standing.record is not None and standing.record.reason:
        return ""
    with contextlib.suppress(ServiceError, OSError):
        lines = log_files(standing)[0].read_text("utf-8", errors="replace").splitlines()[-200:]
        return next((line for line in reversed(lines) if "error: " in line and not line.startswith("srun: ")), "")
    return ""


def read_logs(
    paths: Sequence[Path], going_on: Callable[[], bool], sleep: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """What logs hold and then what is added, as long as `going_on`; of several, each part under its file's name."""
    last = None
    with contextlib.ExitStack() as stack:
        files = [(p, stack.enter_context(p.open("r", encoding="utf-8", errors="replace"))) for p in paths]
        while True:
            more = going_on()  # asked first: the last lines are not missed
            for path, file in files:
                while text := file.read(1 << 16):
                    if path != last and len(files) > 1:
                        yield f"\n==> {path.name} <==\n" if last else f"==> {path.name} <==\n"
                    last = path
                    yield text
            if not more:
                return
            sleep(POLL_S)
