"""The batch script of a service: which options sbatch has, and one template.

Knows sbatch's options by name, and the one line that starts a service on whole nodes. Does not know what a site has,
nor how a script is submitted. Values are written so that neither sbatch nor the shell takes them apart.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metaseq_api.errors import SettingsError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VALUED = _words(
    "account acctg-freq batch bb bbf begin cluster-constraint clusters comment constraint container core-spec "
    "cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution exclude export "
    "extra-node-info gid gpu-bind gpu-freq gpus-per-socket gpus-per-task gres gres-flags hint licenses mail-type "
    "mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist partition power prefer "
    "priority profile propagate qos reservation segment signal sockets-per-node switches thread-spec threads-per-core "
    "time time-min tmp tres-per-task uid wckey"
)
"""sbatch's options that take a value."""
OPTIONAL = ("exclusive", "nice", "get-user-env")
"""Those that may take one."""
BARE = _words(
    "contiguous hold ignore-pbs no-kill no-requeue overcommit oversubscribe reboot requeue spread-job use-min-nodes"
)
"""Those that take none."""
SHORT = {
    "account": "A", "clusters": "M", "constraint": "C", "cpus-per-task": "c", "dependency": "d", "exclude": "x",
    "licenses": "L", "nodelist": "w", "partition": "p", "qos": "q", "time": "t",
}  # fmt: skip
"""One letter of each where sbatch has one that is much used."""
SIGNAL = "B:USR1@120"
"""When a service hears that its time is nearly over, where no --signal says so. Units: seconds before the end."""
OURS = {
    "job-name": "give --name",
    "output": "`metaseq-api-slurm logs NAME` finds it, in the registry",
    "error": "it goes where the output goes",
    "open-mode": "a requeued job appends",
    "array": "give --replicas, or one --name for each service",
    "wrap": "the script is written here",
    "ntasks": "one task a node starts a rank for each GPU",
    "ntasks-per-node": "one task a node starts a rank for each GPU",
    "ntasks-per-core": "one task a node starts a rank for each GPU",
    "ntasks-per-socket": "one task a node starts a rank for each GPU",
    "gpus-per-node": "give --gpus, the GPUs of each node",
    "chdir": "the job runs where it is submitted",
    "input": "a service reads nothing",
    "parsable": "the job's number is printed anyway",
    "wait": "submit waits until the service is ready",
    "test-only": "give --dry-run",
    "kill-on-invalid-dep": "`metaseq-api-slurm status` says when a job will never start",
    "export-file": "give --setup with a line for the script",
    "quiet": "give --no-wait",
}
"""Options of sbatch that a service decides itself, and what to do instead."""

_TEMPLATE = """\
#!/bin/bash
{options}
# Written by metaseq-api-slurm submit. The service tells how it is in {registry}: metaseq-api-slurm status {name}
{setup}export PYTHONSAFEPATH=1 # a folder named metaseq_api in the working directory must not be taken for the package
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}} # srun has not taken this over by itself since SLURM 22.05
{key}
"""
TAIL = r"""job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID} # never a whole array
ending=
trap 'ending=1' TERM # scancel, preemption: slurmd tells every task itself
lost=
export METASEQ_API_NOTIFY_PID=$$ # srun waits minutes for the tasks of a dead node: rank 0 tells this shell itself
trap 'lost=1' USR2
trap 'ending=1; scancel --signal=USR1 "$job"' USR1 # --signal=B: reaches this shell alone; this the tasks

# -K: one lost node ends the job
srun --kill-on-bad-exit=1 --unbuffered --ntasks-per-node=1 \
    COMMAND &
step=$!
until wait "$step"; code=$?; [ "$lost" ] || [ "$code" -le 128 ] || ! kill -0 "$step" 2>/dev/null; do :; done # or a trap
[ -z "$lost" ] || code=20

info=$(scontrol show job "$job")
case $info in # where preemption has a GraceTime, SLURM takes a job that ends within it for done
*JobState=RUNNING*\ PreemptTime=[0-9]*)
    case $info in
    *Requeue=1*)
        echo "metaseq-api: preempted; queued again" >&2
        scontrol requeue "$job" && wait
        ;;
    esac
    ;;
esac
case $code in
20 | 13[0-9] | 14[0-9]) # a rank or node was lost; srun may say by which signal its last tasks ended
    if [ -z "$ending" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ] &&
        scontrol show job "$job" | grep -q 'Requeue=1'; then
        echo "metaseq-api: exit code $code; queued again (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of 5)" >&2
        scontrol requeue "$job" && wait
    fi
    ;;
esac
exit "$code"
"""
"""What follows, the end of slurm/hosted.sbatch: how a service is started, ended, and queued again."""
_KEY = """\
METASEQ_API_KEY=$(cat {file}) || exit 2 # in no argument, where ps would show it, and in no log
export METASEQ_API_KEY
"""


_PROXY = """\
#!/bin/bash
{options}
# Written by metaseq-api-slurm proxy. Before its time is over it lets nobody new in, and what runs goes on.
export PYTHONSAFEPATH=1 # a folder named metaseq_api in the working directory must not be taken for the package
PATH=$PATH:/usr/sbin:/usr/local/sbin
exec {command}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What one service's batch script says."""

    name: str
    nodes: int
    gpus: int
    """GPUs of each node; 0 asks for none."""
    output: str
    registry: str
    command: Sequence[str]
    """What each task runs."""
    replicas: int = 0
    """Elements of its job array; 0 for a job that is none."""
    key_file: str | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)
    """More options of sbatch by name; None for one without a value."""
    setup: Sequence[str] = ()
    """Lines of shell before all else, such as `module load cuda`."""

    def render(self) -> str:
        """The text for sbatch. Raises: SettingsError."""
        options: dict[str, str | None] = {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": "1",
            **({"gpus-per-node": str(self.gpus)} if self.gpus else {}),
            **({"array": f"0-{self.replicas - 1}"} if self.replicas else {}),
            "output": self.output,
            "open-mode": "append",
            **({} if "no-requeue" in self.options else {"requeue": None}),
            "signal": SIGNAL,
        }
        head = _TEMPLATE.format(
            options="\n".join(_option(n, v) for n, v in (options | dict(self.options)).items()),
            name=self.name,
            registry=self.registry,
            setup="".join(f"{line}\n" for line in self.setup),
            key="" if self.key_file is None else _KEY.format(file=shlex.quote(self.key_file)),
        )
        member = ' --member "$SLURM_ARRAY_TASK_ID"' if self.replicas else ""
        return head + TAIL.replace("COMMAND", " ".join(map(shlex.quote, self.command)) + member)


def render_proxy(name: str, output: str, command: Sequence[str], more: Mapping[str, str | None]) -> str:
    """The batch script of a proxy: one task, which is the batch shell itself, so that signals reach it.

    Raises: SettingsError.
    """
    options: dict[str, str | None] = {"job-name": name, "ntasks": "1", "output": output, "open-mode": "append"}
    options |= {**({} if "no-requeue" in more else {"requeue": None}), "signal": SIGNAL, **more}
    return _PROXY.format(
        options="\n".join(_option(n, v) for n, v in options.items()), command=" ".join(map(shlex.quote, command))
    )


def _option(name: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise SettingsError(
            f"--{name} holds a line break or another control character: {value!r}; write it in one line"
        )
    if re.fullmatch(r"[^\s'\"\\#]+", value):
        return f"#SBATCH --{name}={value}"
    quoted = re.sub(r'(["\\])', r"\\\1", value)
    return f'#SBATCH --{name}="{quoted}"'
