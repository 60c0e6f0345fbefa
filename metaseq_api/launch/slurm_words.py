"""SLURM's own words in a person's: why a job waits, how one ended, what a command's complaint means and what to do.

Knows words. Does not know how they are asked for. A word that is not listed is passed on as it is.
"""

from __future__ import annotations

import re

REASONS = {
    "None": "SLURM has not looked at it yet",
    "Priority": "other jobs come first",
    "Resources": "it is next, and waits for nodes to become free",
    "BeginTime": "its begin time has not come",
    "Dependency": "it waits for another job (--dependency)",
    "DependencyNeverSatisfied": "the job it depends on failed, so it will never start: stop it",
    "JobHeldUser": "it is held; `scontrol release JOB` lets it go",
    "JobHeldAdmin": "an administrator holds it; ask them",
    "PartitionConfig": "the partition has not as many nodes, or they are not of this kind: it will never start",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows: it will never start",
    "PartitionTimeLimit": "it asks for more time than the partition allows: lower --time",
    "PartitionDown": "the partition takes no jobs now",
    "PartitionInactive": "the partition takes no jobs now",
    "ReqNodeNotAvail": "nodes it needs are down, or reserved, or its time limit reaches into maintenance",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": (
        "nodes it needs are down, drained or reserved"
    ),
    "Reservation": "its reservation has not begun",
    "Licenses": "it waits for a licence",
    "NodeDown": "a node it needs is down",
    "BadConstraints": "no node is as it asks (--constraint, --gres, --mem): it will never start",
    "JobArrayTaskLimit": "as many of its array run as may at once",
    "launch failed requeued held": "a node could not start it, and it is held now; tell the administrators",
    "AssocMaxJobsLimit": "your account runs as many jobs as it may",
    "InvalidAccount": "its account is not valid: give another --account",
    "InvalidQOS": "its quality of service is not valid: give another --qos",
    "Cleaning": "it was requeued, and its last run is being cleaned up",
}
NEVER = frozenset({"DependencyNeverSatisfied", "PartitionConfig", "PartitionNodeLimit", "BadConstraints"})
"""Reasons of a job that will not start as it is."""
_REFUSALS = (
    ("Unable to contact slurm controller|Socket timed out|Connection refused|Zero Bytes were transmitted", "DEAD"),
    ("[Ii]nvalid partition", "`sinfo` lists the partitions; give one with --partition"),
    ("[Ii]nvalid account", "give an account that is yours with --account (`sacctmgr show assoc user=$USER`)"),
    ("[Ii]nvalid qos", "give a quality of service that is yours with --qos"),
    (
        "Requested node configuration is not available|not available",
        "no node has so many GPUs, CPUs or so much memory: `metaseq-api-slurm doctor` shows what nodes have; lower "
        "--gpus, --nodes, --mem or --cpus-per-task, or choose another --partition",
    ),
    ("time limit", "`metaseq-api-slurm doctor` shows the partition's limit; lower --time"),
    ("submission limit|job limit|MaxSubmit", "you have as many jobs as you may; stop one, or wait"),
    ("Invalid job id", "that job ended some time ago, or never was"),
    ("Access.*denied|not permitted|Permission denied", "the job or partition is not yours to use"),
    ("[Pp]rotocol authentication|[Mm]unge|credential", "munge does not let you in: tell the administrators"),
    (
        "process configuration file|cannot stat file|ClusterName|resolve_ctls",
        "no slurm.conf is found: set SLURM_CONF, or `module load slurm`",
    ),
)


def refusal(command: str, said: str) -> str:
    """What a command's complaint means, and what to do about it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Try ")] or ["it said nothing"]
    first = next((line for line in lines if "error" in line or "unrecognized" in line), lines[0])
    first = re.sub(rf"^{command}: (error: |fatal: )?", "", first)
    hint = next((hint for pattern, hint in _REFUSALS if re.search(pattern, said)), f"see `{command} --help`")
    if hint == "DEAD":
        hint = "SLURM's controller does not answer: see `scontrol ping`, and try again later"
    return f"{command}: {first}; {hint}"


def reason_words(reason: str) -> str:
    """Why a job waits, for a person; SLURM's own word is kept."""
    reason = reason.strip("()")
    known = REASONS.get(reason)
    if known is None:
        limit = re.fullmatch(r"(Assoc|QOS|Grp)\w*", reason)
        known = "a limit of your account or quality of service; ask for less, or wait" if limit else "SLURM says so"
    return f"{known} ({reason})"


def end_words(state: str, reason: str) -> str:
    """How a job ended, for a person."""
    known = {
        "COMPLETED": "its job ended well",
        "CANCELLED": "its job was cancelled",
        "FAILED": "its job failed",
        "TIMEOUT": "its job reached its time limit; submit again with more --time",
        "NODE_FAIL": "a node of its job failed; submit again, perhaps with --requeue",
        "OUT_OF_MEMORY": "its job took more memory than --mem allows; raise --mem",
        "PREEMPTED": "its job was preempted by another; submit again with --requeue",
        "BOOT_FAIL": "a node of its job did not start",
        "DEADLINE": "its job could not end by its --deadline",
    }
    return f"{known.get(state, f'its job ended as {state}')} ({state}{'' if reason == 'None' else f', {reason}'})"
