"""Whether a site is ready for a service: each finding with what to fix, before anything is submitted.

Knows what to look at from the login node, and how to read what probe.py tells from a short trial job on the nodes. Does
not know how findings are shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaseq_api import __version__
from metaseq_api.errors import ClusterError, ResourceError, SettingsError
from metaseq_api.launch import cluster, haproxy
from metaseq_api.launch.cluster import Node, Partition
from metaseq_api.launch.plan import GIB, gpu_memory
from metaseq_api.launch.registry import Registry
from metaseq_api.launch.sbatch import Script

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SKEW_S = 20.0
"""Units: seconds that a node's clock may differ from the login node's before signs of life look old."""
TRIAL_MINUTES = "5"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination; `fix` says what to do, or adds to what is well."""

    ok: bool
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The job that looks at the nodes."""

    nodes: int
    gpus: int
    python: str
    checkpoint: Path | None
    wait_s: float
    options: Mapping[str, str | None] = field(default_factory=dict)


def examine(registry: Registry, partition: str | None, trial: Trial | None) -> Iterator[Finding]:
    """Look at a site from its login node, and, if `trial` is given, from its nodes."""
    missing = [c for c in COMMANDS if shutil.which(c) is None]
    yield Finding(
        not missing,
        f"SLURM's commands: {'missing ' + ', '.join(missing) if missing else 'all there'}",
        "run this on a login node (perhaps `module load slurm` first)" if missing else "",
    )
    if missing:
        return
    try:
        partitions, nodes = cluster.partitions(), cluster.nodes()
    except ClusterError as e:
        yield Finding(False, "SLURM does not answer", str(e))
        return
    yield from judge_partitions(partitions, nodes, partition)
    yield _folder(registry)
    yield _login_name()
    yield _haproxy()
    if trial is None:
        return
    try:
        registry.open()
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=registry.folder, ignore_cleanup_errors=True) as folder:
            yield from _try(trial, Path(folder))
    except (ClusterError, SettingsError) as e:
        yield Finding(False, "the trial job cannot be submitted", str(e))


def judge_partitions(partitions: Sequence[Partition], nodes: Sequence[Node], wanted: str | None) -> Iterator[Finding]:
    """What each partition allows and what its nodes have; the one that is wanted (or the default) must be usable."""
    names = wanted.split(",") if wanted else [p.name for p in partitions if p.is_default]
    if not names:
        yield Finding(False, "no partition is the default", "give one with --partition")
    for name in names:
        if name not in {p.name for p in partitions}:
            known = ", ".join(p.name for p in partitions)
            yield Finding(False, f"there is no partition {name}", f"give one of {known} with --partition")
    for part in partitions:
        mine = [n for n in nodes if part.name in n.partitions]
        usable = [n for n in mine if n.is_usable]
        limit = "no time limit" if part.max_time is None else f"at most {part.max_time / 3600:g} h"
        most = "" if part.max_nodes is None else f", at most {part.max_nodes} nodes a job"
        has = sorted({_has(n) for n in usable})
        what = f"partition {part.name}: {len(usable)} of {len(mine)} nodes usable, {limit}{most}; {'; '.join(has)}"
        good = part.is_up and bool(usable)
        if good or part.name in names:
            fix = "" if good else "it takes no jobs, or all its nodes are down (`sinfo -R` says why): choose another"
            yield Finding(good, what.rstrip("; "), fix)


def _has(node: Node) -> str:
    memory = gpu_memory([node])
    size = f" of {memory // GIB} GiB" if memory else ""
    gpus = f"{node.gpus} GPUs {node.gpu_type}".rstrip() + size if node.gpus else "no GPU"
    return f"{gpus}, {node.cpus} CPUs, {node.memory // GIB} GiB a node"


def _folder(registry: Registry) -> Finding:
    try:
        registry.open()
        with tempfile.NamedTemporaryFile(dir=registry.folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except SettingsError as e:
        return Finding(False, f"registry {registry.folder}", str(e))
    except OSError as e:
        return Finding(
            False, f"registry {registry.folder} cannot be written ({e.strerror})", "make room, or --registry DIR"
        )
    return Finding(True, f"registry {registry.folder}: written from here")


def _login_name() -> Finding:
    name = socket.getfqdn()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return Finding(True, f"this machine is {name} ({address})")
    return Finding(True, f"this machine is {name}", "in the ssh line put the name by which you log in to it")


def _haproxy() -> Finding:
    """Only several replicas behind one address need it, and it may be on another machine."""
    try:
        return Finding(True, f"HAProxy, for `metaseq-api-slurm proxy`: {haproxy.find()}")
    except ResourceError as e:
        return Finding(True, "no HAProxy here; only `metaseq-api-slurm proxy` needs it", str(e))


def _try(trial: Trial, folder: Path) -> Iterator[Finding]:
    """Run probe.py on the nodes and judge what it tells; the job is gone on return."""
    log = folder / "log"
    script = Script(
        name="metaseq-api-doctor",
        nodes=trial.nodes,
        gpus=trial.gpus,
        output=str(log).replace("%", "%%"),
        registry=str(folder.parent),
        options={"time": TRIAL_MINUTES} | dict(trial.options),
        command=[
            *(trial.python, "-m", "metaseq_api.launch.probe", str(folder), str(trial.nodes)),
            *([] if trial.checkpoint is None else [str(trial.checkpoint)]),
        ],
    )
    job = cluster.submit(script.render())
    try:
        said, ended, hint = _await(job, trial, folder)
        if ended:
            wrote = log.read_text("utf-8", errors="replace").strip().splitlines() if log.is_file() else []
            told = f"; it wrote: {wrote[-1]}" if wrote else ""
            what = f"trial job {job} on {trial.nodes} node(s): {len(said)} told, {ended}{told}"
            yield Finding(False, what, hint)
        elif not said:
            yield Finding(False, *_unseen(folder))
        if said:
            yield from judge_nodes(said, trial, time.time())
    finally:
        cluster.cancel(job)
        _await_gone(job)


def _await(job: str, trial: Trial, folder: Path) -> tuple[list[dict[str, Any]], str, str]:
    """What the nodes told; why not all of them did, and what may be done about it."""
    python = shlex.quote(trial.python)
    elsewhere = f"is {python} (with metaseq-api) there on every node, and the registry too?"
    deadline = time.monotonic() + trial.wait_s
    while True:
        now = cluster.jobs([job]).get(job)
        said = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))]
        if len(said) == trial.nodes:
            return said, "", ""
        if now is None or not (now.is_queued or now.is_running):
            return said, "its job is gone" if now is None else now.words, elsewhere
        if now.never_starts:
            return said, now.words, "ask for less, with --nodes 1 say"
        if time.monotonic() > deadline:
            hint = "raise --wait-s, or try --nodes 1" if now.is_queued else elsewhere
            return said, f"after {trial.wait_s:.0f} s it is {now.words}", hint
        time.sleep(0.5)


def _unseen(folder: Path) -> tuple[str, str]:
    return (
        f"what the nodes wrote in {folder} is not seen from here",
        "name a folder that all of them share with --registry",
    )


def _await_gone(job: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(ClusterError):
            now = cluster.jobs([job]).get(job)
            if now is None or not (now.is_queued or now.is_running):
                return
        time.sleep(0.2)


def judge_nodes(said: Sequence[Mapping[str, Any]], trial: Trial, now: float) -> Iterator[Finding]:
    """What the probes told, as findings."""
    names = ", ".join(str(s["node"]) for s in said)
    yield Finding(True, f"trial job ran on {names}: Python {said[0]['python']}; the registry is shared with them")
    for s in said:
        yield from _judge_node(s, trial)
    skew = max(abs(now - float(s["time"])) for s in said)
    if skew > SKEW_S + 60:
        yield Finding(False, f"a node's clock is {skew:.0f} s off", "have the administrators start NTP there")
    ways = [(s["node"], peer, told) for s in said for peer, told in s["peers"].items()]
    for node, peer, told in ways:
        if told != "ok":
            fix = "ranks on several nodes must meet over TCP: ask which interface or firewall; --nodes 1 works"
            yield Finding(False, f"{node} does not reach {peer}: {told}", fix)
    expected = len(said) * (len(said) - 1)
    if len(said) > 1 and len(ways) == expected and all(told == "ok" for *_, told in ways):
        yield Finding(True, f"the nodes reach each other over TCP ({expected} ways)")
    elif len(ways) < expected:
        yield Finding(
            False, "not every node met every other", "the shared folder may be slow to show files; run it again"
        )


def _judge_node(said: Mapping[str, Any], trial: Trial) -> Iterator[Finding]:
    node, torch, files = said["node"], said["torch"], said["checkpoint"]
    if said["version"] != __version__:
        yield Finding(False, f"{node} has metaseq-api {said['version']}, here is {__version__}", "give --python FILE")
    known = str(said["address"])
    if known.startswith("unknown") and trial.nodes > 1:
        yield Finding(
            False, f"{node} does not know its own name ({known})", "have it in DNS or /etc/hosts, or set MASTER_ADDR"
        )
    net = f"interfaces {', '.join(said['interfaces']) or 'none but lo'}, a free port was bound"
    net = net if known.startswith("unknown") else f"{known} by name, {net}"
    yield Finding(True, f"{node}: {net}")
    if "error" in torch:
        yield Finding(
            False, f"{node}: torch cannot be imported: {torch['error']}", "install it for that Python: --python FILE"
        )
    else:
        gpus = [f"{m / GIB:.0f} GiB" for m in torch["gpus"]]
        nccl = f"NCCL {torch['nccl']}" if torch["nccl"] else "no NCCL"
        cards = f"{len(gpus)} GPU(s) {', '.join(gpus)}".rstrip()
        short = trial.gpus > len(gpus)
        blind = "torch sees fewer GPUs than SLURM gives: a torch built for CUDA, and its driver, must be there"
        yield Finding(not short, f"{node}: torch {torch['torch']}, {nccl}, {cards}", blind if short else "")
    if files is not None:
        bad = files["bad"]
        fix = "" if not bad and files["files"] else "put it in storage that the nodes share, readable by you"
        yield Finding(
            not fix,
            f"{node}: {files['files']} checkpoint files, {len(bad)} unreadable {' '.join(bad[:1])}".rstrip(),
            fix,
        )
