"""Who started this process, which ranks it stands for, and where all ranks meet.

The one file that reads SLURM_*, torchrun's variables and CUDA_VISIBLE_DEVICES. Three ways to be started:

    alone   nobody placed us (a shell, a batch script, salloc): this machine's ranks are ours to start
    node    one srun task per node: the ranks of this node are ours to start, numbered after the node
    rank    one task per rank, under srun or torchrun: be that rank

Knows names and numbers. Does not know torch, processes or the model; opens no socket. Ranks meet at `RankInfo.init`:

    file:///proc/self/fd/N   ranks of one supervisor, which inherited that file from it: no port, no name
    tcp://address:port       rank 0 listens there, the others come
    agent://address:port     torchrun's agent listens there already: every rank comes, none listens
    step://node/name         rank 0's doorman on that node tells the port to whoever names the step (`meeting`)
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metaseq_api.errors import ResourceError, SettingsError

# SLURM numbers its own steps from 0xfffffffa up: interactive (salloc), batch script, extern, pending
_FIRST_SPECIAL_STEP = 0xFFFFFFFA


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """One rank: its number, its number on its machine, and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    """The machine's name as SLURM calls it, else the host name; for messages."""
    init: str
    supervised: bool = False
    """Whether a supervisor of ours started it, who looks after it; not srun or torchrun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The SLURM job that this process is part of."""

    job_id: str
    """As SLURM's commands take it: 17, or 17_2 for an element of a job array."""
    restarts: int = 0
    """How often SLURM has started it again: after `scontrol requeue`, preemption, or a node's failure."""
    end_time: float | None = None
    """Units: seconds of the epoch; None where SLURM's environment does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How this process was started. `rank` is set where `kind` is "rank", `meet` where there are several machines."""

    kind: Literal["alone", "node", "rank"]
    node: str
    node_rank: int = 0
    num_nodes: int = 1
    meet: str | None = None
    rank: RankInfo | None = None
    under_agent: bool = False
    """Whether torchrun's agent is our parent, which does not take its workers along when it is killed."""

    @property
    def has_rank_0(self) -> bool:
        """Whether rank 0 is this process or will be its child."""
        return self.rank.rank == 0 if self.rank else self.node_rank == 0

    def local_ranks(self, num_ranks: int, store: str) -> list[RankInfo]:
        """The ranks of this machine out of `num_ranks` in all; `store` is where they meet if there is no other machine.

        Raises: SettingsError where the nodes do not share the ranks evenly.
        """
        each, rest = divmod(num_ranks, self.num_nodes)
        if rest or not each:
            raise SettingsError(
                f"{num_ranks} ranks do not spread evenly over the {self.num_nodes} nodes of this job; "
                f"give --model-parallel a multiple of {self.num_nodes}, or srun another --nodes"
            )
        return [
            RankInfo(
                rank=self.node_rank * each + i,
                world_size=num_ranks,
                local_rank=i,
                local_world_size=each,
                node=self.node,
                init=self.meet or store,
                supervised=True,
            )
            for i in range(each)
        ]


def detect(environ: Mapping[str, str]) -> Placement:
    """Tell from the environment who started this process.

    Raises: SettingsError naming the variable that is missing or unusable.
    """
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    # a batch script may have exported RANK=0 to every task of its srun, so SLURM's word comes before a stray RANK
    if "TORCHELASTIC_RUN_ID" not in environ and _is_slurm_task(environ):
        return _under_slurm(environ, node)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _under_torchrun(environ, node)
    return Placement(kind="alone", node=node)


def job_of(environ: Mapping[str, str]) -> Job | None:
    """The job this process is in, be it in a step, a batch script or an salloc shell; None outside SLURM."""
    job_id = environ.get("SLURM_JOB_ID")
    if not job_id:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:  # one element has the number of the whole array, which scancel would take for all of it
        job_id = f"{array}_{task}"
    restarts, end = environ.get("SLURM_RESTART_COUNT", ""), environ.get("SLURM_JOB_END_TIME", "")
    return Job(
        job_id=job_id,
        restarts=int(restarts) if restarts.isdecimal() else 0,
        end_time=float(end) if end.isdecimal() else None,
    )


def outside_of_job() -> dict[str, str]:
    """This environment as the login shell had it: without what SLURM, srun and the batch script added for one job."""
    theirs = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_", "METASEQ_API_KEY")
    return {k: v for k, v in os.environ.items() if not k.startswith(theirs) or k == "SLURM_CONF"}


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started us; a batch script and an salloc shell carry SLURM_* too, but no step of their own."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in environ


def _under_torchrun(environ: Mapping[str, str], node: str) -> Placement:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [n for n in names if not environ.get(n)]:
        raise SettingsError(
            f"RANK and WORLD_SIZE are set, as torchrun sets them, but {', '.join(missing)} not; "
            "unset them to start alone, or set them all"
        )
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    info = RankInfo(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE"),
        node=node,
        init=_address("agent" if agent else "tcp", environ["MASTER_ADDR"], _master_port(environ)),
    )
    return Placement(kind="rank", node=node, rank=info, under_agent="TORCHELASTIC_RUN_ID" in environ)


def _under_slurm(environ: Mapping[str, str], node: str) -> Placement:
    num_tasks = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    num_nodes = _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    node_rank = _number(environ, "SLURM_NODEID")
    meet = _meeting(environ, num_nodes)
    if num_tasks == num_nodes:
        return Placement(
            kind="node",
            node=node,
            node_rank=node_rank,
            num_nodes=num_nodes,
            meet=meet if num_nodes > 1 else None,
        )
    tasks = expand_tasks(_text(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if node_rank >= len(tasks):
        raise SettingsError(f"SLURM_NODEID is {node_rank}, but SLURM names tasks on {len(tasks)} nodes only: {tasks}")
    local_rank = _number(environ, "SLURM_LOCALID")
    info = RankInfo(
        # not SLURM_PROCID, which --distribution=cyclic deals out over the nodes: neighbours are to share one
        rank=sum(tasks[:node_rank]) + local_rank,
        world_size=num_tasks,
        local_rank=local_rank,
        local_world_size=tasks[node_rank],
        node=node,
        init=meet,
    )
    return Placement(kind="rank", node=node, node_rank=node_rank, num_nodes=num_nodes, meet=meet, rank=info)


def _first_node(environ: Mapping[str, str], num_nodes: int) -> str:
    if named := environ.get("MASTER_ADDR"):
        return named
    if num_nodes == 1:
        return "127.0.0.1"
    return expand_nodes(_text(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))[0]


def _meeting(environ: Mapping[str, str], num_nodes: int) -> str:
    """$MASTER_PORT where it is set; else the step's name, by which rank 0's doorman is found."""
    node = _first_node(environ, num_nodes)
    if environ.get("MASTER_PORT"):
        return _address("tcp", node, _master_port(environ))
    job = job_of(environ)
    name = f"{_number(environ, 'SLURM_JOB_ID')}.{_number(environ, 'SLURM_STEP_ID')}.{job.restarts if job else 0}"
    return f"step://{node}/{name}"


def _master_port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise SettingsError(
            f"MASTER_PORT is {port}; all ranks meet there, so it must be one from 1 to 65535 (torchrun: --standalone)"
        )
    return port


def _text(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if value := environ.get(name):
            return value
    raise SettingsError(f"{names[0]} is not set, though SLURM_STEP_ID is; start through srun, or unset SLURM_STEP_ID")


def _number(environ: Mapping[str, str], *names: str) -> int:
    value = _text(environ, *names)
    if not value.isdecimal():
        raise SettingsError(f"{names[0]} is {value!r}; it must be a whole number, as srun and torchrun set it")
    return int(value)


def _address(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def expand_nodes(text: str) -> list[str]:
    """Node names of a SLURM node list such as `a[1-3,07],b`, in SLURM's order.

    Source: the hostlist expressions of `scontrol show hostnames`. Raises: SettingsError.
    """
    if not text or not re.fullmatch(r"(?:[^\[\],\s]|\[[0-9,-]+\])+(?:,(?:[^\[\],\s]|\[[0-9,-]+\])+)*", text):
        raise SettingsError(f"cannot read the node list {text!r}; set MASTER_ADDR to the first node's name")
    names: list[str] = []
    for item in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        expanded = [""]
        for fixed, choices in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            tails = [fixed] if fixed else [n for part in choices.split(",") for n in _range(part, text)]
            expanded = [head + tail for head in expanded for tail in tails]
        names += expanded
    return names


def _range(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise SettingsError(f"cannot read {part!r} in the node list {text!r}; set MASTER_ADDR to the first node's name")
    low, high = match[1], match[2] or match[1]
    return [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]


def expand_tasks(text: str) -> list[int]:
    """Tasks of each node out of SLURM's `2(x3),1`.

    Raises: SettingsError.
    """
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise SettingsError(f"cannot read SLURM_TASKS_PER_NODE={text!r}; it should look like 2(x3),1")
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def visible_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """How many GPUs this process may use, as far as one can tell without loading CUDA.

    CUDA_VISIBLE_DEVICES counts up to its first negative entry, as CUDA reads it.
    """
    present = sum(1 for path in dev.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal())
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or not present:
        return present
    entries = [entry.strip() for entry in listed.split(",")]
    usable = next((i for i, entry in enumerate(entries) if not entry or entry.startswith("-")), len(entries))
    return usable if any(not entry.isdecimal() for entry in entries[:usable]) else min(usable, present)


def device_index(local_rank: int, num_visible: int) -> int:
    """Which of the `num_visible` GPUs this rank takes.

    SLURM shows a task either every GPU of its node (take the local rank's) or only its own (it is number 0).
    Raises: ResourceError where there are fewer GPUs than ranks.
    """
    if num_visible == 1:
        return 0
    if local_rank < num_visible:
        return local_rank
    raise ResourceError(
        f"this is rank {local_rank} of its machine, which shows {num_visible} GPUs; ask for one GPU per rank "
        "(--gpus-per-node or --gpus-per-task), or a smaller --model-parallel"
    )
