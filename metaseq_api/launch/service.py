"""A service's life as seen from a login node: submitted under a name, waited for, found again, stopped.

Knows the registry and SLURM, and brings their words together. Does not know the model, nor how anything is shown.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.errors import ClusterError, ServiceError, SettingsError
from metaseq_api.launch import cluster
from metaseq_api.launch.cluster import Job
from metaseq_api.launch.plan import Layout
from metaseq_api.launch.registry import Record, Registry, Submission, write_private
from metaseq_api.launch.sbatch import Script
from metaseq_api.launch.standing import Standing, judge

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
    submission, records = registry.submission(name), registry.records(name)
    if submission is None and not records:
        return None
    job = _job_of(submission, records)
    jobs = (slurm or Slurm()).jobs([job] if job else [])
    return judge(name, submission, records, (jobs or {}).get(job), time.time(), slurm_answers=jobs is not None)


def look(registry: Registry, name: str, slurm: Slurm | None = None) -> Standing:
    """How the service of this name stands. Raises: ServiceError where there is none."""
    standing = find(registry, name, slurm)
    if standing is None:
        known = ", ".join(registry.names()) or "none"
        raise ServiceError(f"there is no service {name} in {registry.folder}; there are: {known}")
    return standing


def look_at_all(registry: Registry) -> list[Standing]:
    """How every service stands, SLURM being asked once."""
    found = [(name, registry.submission(name), registry.records(name)) for name in registry.names()]
    number = {name: _job_of(submission, records) for name, submission, records in found if submission or records}
    jobs = Slurm().jobs([job for job in number.values() if job])
    return [
        judge(name, sub, records, (jobs or {}).get(number[name]), time.time(), slurm_answers=jobs is not None)
        for name, sub, records in found
        if name in number
    ]


def _job_of(submission: Submission | None, records: list[Record]) -> str:
    return submission.job if submission else next((r.job for r in records if r.job), None) or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A service to be submitted. `key` None makes one, "" asks for none."""

    name: str
    layout: Layout
    checkpoint: Path | None
    """None serves the demo."""
    host: str
    port: int
    key: str | None
    python: str
    options: Mapping[str, str | None]
    setup: Sequence[str]
    flags: Sequence[str]
    """More flags of metaseq-api-local."""

    def script(self, registry: Registry) -> Script:
        """Its batch script."""
        folder = str(registry.folder)
        return Script(
            name=self.name,
            nodes=self.layout.nodes,
            gpus=self.layout.per_node if self.layout.gpus else 0,
            # sbatch fills in its own %, so those of the path are doubled
            output=str(registry.log_file(self.name, "")).replace("%", "%%").replace("-.log", "-%j.log"),
            registry=folder,
            key_file=None if self.key == "" else str(registry.key_file(self.name)),
            options=self.options,
            setup=self.setup,
            command=[
                *(self.python, "-m", "metaseq_api.cli.interactive_hosted"),
                *([] if self.checkpoint is None else [str(self.checkpoint)]),
                *("--model-parallel", str(self.layout.model_parallel), "--host", self.host, "--port", str(self.port)),
                *([] if self.layout.gpus else ["--device", "cpu"]),
                *("--registry", folder, "--service", self.name),
                *self.flags,
            ],
        )


def submit(registry: Registry, order: Order) -> tuple[Submission, str | None]:
    """Submit a service under its name; what was submitted, and the key where one was made.

    An ended service of that name is forgotten, but for its log. Nothing is left behind where SLURM refuses.
    Raises: ServiceError where the name is taken; SettingsError; ClusterError.
    """
    text = order.script(registry).render()
    registry.open()
    _take_name(registry, order.name)
    job = None
    try:
        made = secrets.token_urlsafe(32) if order.key is None else None
        key = made or order.key
        if key:
            write_private(registry.key_file(order.name), key + "\n")
        job = cluster.submit(text)
        submission = Submission(
            name=order.name,
            job=job,
            model="demo" if order.checkpoint is None else str(order.checkpoint),
            submitted=time.time(),
            login=socket.getfqdn(),
            key_file=str(registry.key_file(order.name)) if key else None,
            log=str(registry.log_file(order.name, job)),
        )
        registry.write_submission(submission)
    except BaseException as e:
        if job is not None:
            cluster.cancel(job)
        registry.forget(order.name)
        if isinstance(e, OSError):
            raise SettingsError(
                f"cannot write {registry.folder} ({e.strerror}); make room, or name another folder with --registry"
            ) from None
        raise
    return submission, made


def _take_name(registry: Registry, name: str) -> None:
    if registry.is_claimed(name, time.time()):
        raise ServiceError(f"somebody is submitting {name} at this moment; wait, or choose another --name")
    standing = find(registry, name)
    if standing is not None and not standing.has_ended:
        raise ServiceError(
            f"there is a service {name} already, job {standing.job or '?'}: {standing.words}; "
            f"`metaseq-api-slurm stop {name}` ends it, or choose another --name"
        )
    registry.forget(name)
    registry.claim(name)


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
    """End a service and forget it, but for its log; how it stood before. Returns once its job is gone.

    Raises: ServiceError where there is none, or SLURM has no hold on it; ClusterError.
    """
    before = look(registry, name)
    if before.job:
        deadline = time.monotonic() + GONE_S
        job = cluster.jobs([before.job]).get(before.job)
        if job is not None and (job.is_queued or job.is_running):
            cluster.cancel(before.job)
        while job is not None and (job.is_queued or job.is_running):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {before.job} was cancelled {GONE_S:.0f} s ago and is {job.words}; look again later"
                )
            sleep(POLL_S)
            job = cluster.jobs([before.job]).get(before.job)
    elif not before.has_ended:
        node = before.record.node if before.record else "?"
        raise ServiceError(f"{name} runs on {node} outside of SLURM: end it where it was started, with Ctrl-C")
    registry.forget(name)
    return before


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


def log_file(registry: Registry, standing: Standing) -> Path:
    """Where a service's output is. Raises: ServiceError where it has none yet."""
    path = Path(standing.submission.log) if standing.submission else registry.log_file(standing.name, standing.job)
    if not path.exists():
        raise ServiceError(f"{standing.name} has written no log yet ({standing.words}); look again later")
    return path


def last_error(registry: Registry, standing: Standing) -> str:
    """The last error in a service's log, for one that ended before it could keep a record; "" where there is none."""
    if standing.record is not None and standing.record.reason:
        return ""
    with contextlib.suppress(ServiceError, OSError):
        lines = log_file(registry, standing).read_text("utf-8", errors="replace").splitlines()[-200:]
        return next((line for line in reversed(lines) if "error: " in line and not line.startswith("srun: ")), "")
    return ""


def read_log(path: Path, going_on: Callable[[], bool], sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """What a log holds and then what is added, as long as `going_on`; its last lines are not missed."""
    with path.open("r", encoding="utf-8", errors="replace") as file:
        while True:
            more = going_on()
            while text := file.read(1 << 16):
                yield text
            if not more:
                return
            sleep(POLL_S)
