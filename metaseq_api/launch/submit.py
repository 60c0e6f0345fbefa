"""How a service begins: planned, written as a batch script, and submitted under a name.

Knows the registry and the script. Does not know the model, nor what becomes of the job (`service`).
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.errors import ServiceError, SettingsError
from metaseq_api.launch import cluster
from metaseq_api.launch.plan import Layout
from metaseq_api.launch.proxy import check_free
from metaseq_api.launch.registry import Record, Registry, Submission, replace_json, write_private
from metaseq_api.launch.sbatch import SIGNAL, Script, render_proxy
from metaseq_api.launch.service import find, look
from metaseq_api.launch.successor import OVERLAP_S


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
    replicas: int = 1
    successor: bool = False
    """Whether each member submits the job that takes over from it, before its time is over."""

    @property
    def elements(self) -> int:
        """Elements of its job array; 0 where one plain job does."""
        return self.replicas if self.replicas > 1 or self.successor else 0

    def script(self, registry: Registry) -> Script:
        """Its batch script."""
        folder = str(registry.folder)
        number = "-%A_%a.log" if self.elements else "-%j.log"
        return Script(
            name=self.name,
            nodes=self.layout.nodes,
            gpus=self.layout.per_node if self.layout.gpus else 0,
            # sbatch fills in its own %, so those of the path are doubled
            output=str(registry.log_file(self.name, "")).replace("%", "%%").replace("-.log", number),
            replicas=self.elements,
            registry=folder,
            key_file=None if self.key == "" else str(registry.key_file(self.name)),
            options=self.options,
            setup=self.setup,
            command=[
                *(self.python, "-m", "metaseq_api.cli.interactive_hosted"),
                *([] if self.checkpoint is None else [str(self.checkpoint)]),
                *("--model-parallel", str(self.layout.model_parallel), "--host", self.host, "--port", str(self.port)),
                *("--device", "cuda" if self.layout.gpus else "cpu"),
                *("--registry", folder, "--service", self.name),
                *(["--successor", str(self.replicas)] if self.successor else []),
                *self.flags,
            ],
        )


def check_succession(options: Mapping[str, str | None]) -> None:
    """Whether a successor can be there before `--signal` ends a member. Raises: SettingsError."""
    total = cluster.parse_time(options.get("time") or "")
    told = re.search(r"@(\d+)$", options.get("signal") or SIGNAL)
    before = int(told[1]) if told else 60
    if total is not None and total / 2 < before + OVERLAP_S:
        raise SettingsError(
            f"--successor is submitted at half of --time {options['time']}, and --signal ends the service {before} s "
            "before the end, which is sooner; give it more --time, or a later signal, as --signal B:USR1@10"
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
        if order.successor:
            write_private(registry.script_file(order.name), text)
        job = cluster.submit(text)
        submission = Submission(
            name=order.name,
            job=job,
            model="demo" if order.checkpoint is None else str(order.checkpoint),
            submitted=time.time(),
            login=socket.getfqdn(),
            key_file=str(registry.key_file(order.name)) if key else None,
            log=str(registry.log_file(order.name, f"{job}_%a" if order.elements else job)),
            replicas=order.elements,
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


def submit_proxy(
    registry: Registry,
    name: str,
    *,
    python: str,
    host: str,
    port: int,
    program: str | None,
    options: Mapping[str, str | None],
) -> str:
    """Submit the proxy of a service as a job of its own; the job. Raises: ServiceError, SettingsError, ClusterError."""
    look(registry, name)
    check_free(registry, name, None)
    command = [python, "-m", "metaseq_api.slurm.manage", "proxy", name, "--registry", str(registry.folder)]
    command += ["--host", host, "--port", str(port), *(["--haproxy", program] if program else [])]
    output = str(registry.log_file(name, "")).replace("%", "%%").replace("-.log", "-proxy-%j.log")
    job = cluster.submit(render_proxy(f"{name}-proxy", output, command, options))
    waiting = Record(name=name, state="queued", heartbeat=time.time(), job=job)  # until it speaks for itself
    replace_json(registry.proxy_file(name), dataclasses.asdict(waiting))
    return job
