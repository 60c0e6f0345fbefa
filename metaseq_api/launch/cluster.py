"""SLURM as text in, text out: each function runs one of its commands and reads what it prints.

Knows the commands' formats since SLURM 20.11: `-o` formats and `scontrol -o`, for `--json` is not in every 22.05. Does
not know what a job is for. Whatever goes wrong is one line that says what to do.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metaseq_api.errors import ClusterError
from metaseq_api.launch.rendezvous import expand_nodes
from metaseq_api.launch.slurm_words import NEVER, end_words, reason_words, refusal

TIMEOUT_S = 60.0
"""Units: seconds for one command; those of a dead controller give up by themselves after about ten."""
_FIELDS = "%i|%T|%r|%N|%S|%e|%L|%V|%j"
_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job as squeue tells it."""

    id: str
    state: str
    reason: str = "None"
    nodes: str = ""
    start: str = "N/A"
    """When it began, or is expected to."""
    end: str = "N/A"
    left: str = ""
    name: str = ""

    @property
    def is_queued(self) -> bool:
        return self.state in _QUEUED

    @property
    def never_starts(self) -> bool:
        """Whether it waits for what will not come."""
        return self.is_queued and self.reason.strip("()") in NEVER

    @property
    def is_running(self) -> bool:
        return self.state in _RUNNING

    @property
    def began(self) -> float | None:
        """When it last began to run, in seconds since 1970; None where squeue does not say so."""
        with contextlib.suppress(ValueError, OverflowError):
            return time.mktime(time.strptime(self.start, "%Y-%m-%dT%H:%M:%S"))
        return None

    @property
    def words(self) -> str:
        """Where it stands, for a person."""
        if self.is_queued:
            expected = f"; expected to start at {self.start}" if self.start not in ("N/A", "") else ""
            return f"queued: {reason_words(self.reason)}{expected}"
        if self.is_running:
            return f"{self.state.lower()} on {self.nodes}"
        return end_words(self.state, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one node has. Units: bytes."""

    name: str
    state: str
    cpus: int
    memory: int
    gpus: int
    gpu_type: str
    features: tuple[str, ...]
    partitions: tuple[str, ...]

    @property
    def is_usable(self) -> bool:
        return not re.search(r"DOWN|DRAIN|FAIL|MAINT|NOT_RESPONDING|\*", self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Units: max_time in seconds, None without a limit; max_nodes None without one."""

    name: str
    is_default: bool
    is_up: bool
    max_time: int | None
    max_nodes: int | None
    nodes: tuple[str, ...]


def run(argv: Sequence[str], text: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command of SLURM; what it printed. Raises: ClusterError in one line."""
    try:
        done = subprocess.run(
            argv, input=text, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise ClusterError(
            f"{argv[0]} is not found; run this on a login node of a SLURM cluster (perhaps `module load slurm` first)"
        ) from None
    except OSError as e:
        raise ClusterError(f"{argv[0]} cannot be run ({e.strerror}); see its rights and your PATH") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"{argv[0]} said nothing for {TIMEOUT_S:.0f} s; see `scontrol ping`, and `squeue --me` for what it did all "
            "the same, then try again"
        ) from None
    if done.returncode:
        raise ClusterError(refusal(argv[0], done.stderr or done.stdout))
    return done.stdout


def submit(script: str, argv: Iterable[str] = (), env: Mapping[str, str] | None = None) -> str:
    """Submit a batch script; the job's id. Raises: ClusterError."""
    said = run(["sbatch", "--parsable", *argv], script, env).strip()
    job = said.splitlines()[-1].partition(";")[0] if said else ""  # "17;cluster" in a federation
    if not job.isdigit():
        raise ClusterError(f"sbatch said {said!r} in place of a job's number; look with `squeue --me`")
    return job


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Those of these jobs that SLURM still knows, ended ones for a few minutes included. Raises: ClusterError."""
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    try:
        said = run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}", "-o", _FIELDS])
    except ClusterError as e:
        if "Invalid job id" in str(e):  # said of a single one; of several, those unknown are left out
            return {}
        raise
    return {job.id: job for job in parse_jobs(said)}


def parse_jobs(said: str) -> list[Job]:
    """The lines of `squeue -o` with this file's format."""
    found = []
    for line in said.splitlines():
        parts = line.split("|", 8)
        if len(parts) == 9:
            job, state, reason, nodes, start, end, left, _, name = (p.strip() for p in parts)
            found.append(
                Job(id=job, state=state, reason=reason, nodes=nodes, start=start, end=end, left=left, name=name)
            )
    return found


def cancel(job: str) -> None:
    """End a job; one that has ended already is no error. Raises: ClusterError."""
    try:
        run(["scancel", job])
    except ClusterError as e:
        if "Invalid job id" not in str(e):
            raise


def nodes() -> list[Node]:
    """Every node. Raises: ClusterError."""
    return [parse_node(line) for line in run(["scontrol", "show", "node", "-o"]).splitlines() if line.strip()]


def partitions() -> list[Partition]:
    """Every partition this user sees. Raises: ClusterError."""
    said = run(["scontrol", "show", "partition", "-o"])
    return [parse_partition(line) for line in said.splitlines() if line.strip()]


def nodes_of(partition: str | None) -> list[Node]:
    """The nodes of a partition (or several, with commas; None: the default) that are in use. Raises: ClusterError."""
    wanted = partition.split(",") if partition else [p.name for p in partitions() if p.is_default]
    return [node for node in nodes() if node.is_usable and set(node.partitions) & set(wanted)]


def parse_fields(line: str) -> dict[str, str]:
    """`Name=value Name=value` of `scontrol -o`, values with blanks included."""
    pattern = r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)"
    found: dict[str, str] = {}
    for name, value in re.findall(pattern, line):
        found.setdefault(name, value)
    return found


def parse_node(line: str) -> Node:
    """One line of `scontrol show node -o`."""
    f = parse_fields(line)
    gpus, kind = parse_gres(f.get("Gres", ""))
    return Node(
        name=f.get("NodeName", "?"),
        state=f.get("State", "?"),
        cpus=_whole(f, "CPUEfctv", "CPUTot"),
        memory=_whole(f, "RealMemory") << 20,
        gpus=gpus,
        gpu_type=kind,
        features=_listed(f.get("AvailableFeatures", "")),
        partitions=_listed(f.get("Partitions", "")),
    )


def parse_partition(line: str) -> Partition:
    """One line of `scontrol show partition -o`."""
    f = parse_fields(line)
    names = f.get("Nodes", "")
    return Partition(
        name=f.get("PartitionName", "?"),
        is_default=f.get("Default") == "YES",
        is_up=f.get("State") == "UP",
        max_time=parse_time(f.get("MaxTime", "UNLIMITED")),
        max_nodes=int(f["MaxNodes"]) if f.get("MaxNodes", "").isdigit() else None,
        nodes=tuple(expand_nodes(names)) if names not in ("", "(null)") else (),
    )


def parse_gres(text: str) -> tuple[int, str]:
    """How many GPUs a Gres names, and of which type: `gpu:a100:4(S:0-1),gpu:a100:4,nvme:1` is 8 of a100."""
    count, kinds = 0, []
    for kind, number in re.findall(r"(?:^|,)gpu(?::([^:,()]*[^:,()\d][^:,()]*))?(?::(\d+))?(?=[,(]|$)", text):
        count += int(number or 1)
        kinds += [kind] if kind else []
    return count, kinds[0] if kinds else ""


def parse_time(text: str) -> int | None:
    """Seconds of SLURM's `days-hours:minutes:seconds` and its short forms; None where there is no limit.

    Source: sbatch's --time: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours" and so on.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    days, a, b, c = (None if g is None else int(g) for g in match.groups())
    assert a is not None
    if days is not None:
        return ((days * 24 + a) * 60 + (b or 0)) * 60 + (c or 0)
    if c is not None:
        return (a * 60 + (b or 0)) * 60 + c
    return a * 60 + (b or 0)


def _whole(fields: Mapping[str, str], *names: str) -> int:
    return next((int(fields[n]) for n in names if fields.get(n, "").isdigit()), 0)


def _listed(text: str) -> tuple[str, ...]:
    return () if text in ("", "(null)") else tuple(text.split(","))
