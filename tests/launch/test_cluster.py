"""SLURM's texts, as 22.05 and later print them, read; and its refusals in a person's words."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from metaseq_api.errors import ClusterError
from metaseq_api.launch import cluster
from metaseq_api.launch.cluster import Job
from metaseq_api.launch.slurm_words import REASONS, end_words, reason_words, refusal

NODE = (
    "NodeName=gpu07 Arch=x86_64 CoresPerSocket=32  CPUAlloc=0 CPUEfctv=126 CPUTot=128 CPULoad=4.34 "
    "AvailableFeatures=ib,a100_80gb ActiveFeatures=ib Gres=gpu:a100:8(S:0-1) NodeAddr=gpu07 Version=23.11.4 "
    "OS=Linux 6.1.0-18-amd64 #1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1  RealMemory=1031000 AllocMem=0 State=MIXED+PLANNED "
    "Partitions=gpu,long  BootTime=2026-11-20T13:19:04 CfgTRES=cpu=126,mem=1031000M,gres/gpu=8 AllocTRES= "
    "Reason=kill task failed [root@2026-11-19T10:00:00]"
)
PARTITION = (
    "PartitionName=gpu AllowGroups=ALL Default=YES QoS=N/A MaxNodes=16 MaxTime=2-00:00:00 MinNodes=0 "
    "Nodes=gpu[07-09,12] State=UP TotalCPUs=512 DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED"
)


def test_a_node_is_read_with_its_gpus_memory_and_features() -> None:
    node = cluster.parse_node(NODE)
    assert (node.name, node.state, node.cpus, node.memory) == ("gpu07", "MIXED+PLANNED", 126, 1031000 << 20)
    assert (node.gpus, node.gpu_type, node.features) == (8, "a100", ("ib", "a100_80gb"))
    assert node.partitions == ("gpu", "long")
    assert node.is_usable


@pytest.mark.parametrize("state", ["DOWN*", "IDLE+DRAIN", "DRAINED", "MIXED+MAINT", "IDLE*", "FAIL"])
def test_a_node_that_takes_no_jobs_is_not_usable(state: str) -> None:
    assert not cluster.parse_node(NODE.replace("MIXED+PLANNED", state)).is_usable


def test_values_with_blanks_do_not_hide_the_next_field() -> None:
    fields = cluster.parse_fields(NODE)
    assert fields["OS"] == "Linux 6.1.0-18-amd64 #1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1"
    assert fields["AllocTRES"] == ""
    assert fields["Reason"] == "kill task failed [root@2026-11-19T10:00:00]"


def test_a_partition_is_read_with_its_limits() -> None:
    part = cluster.parse_partition(PARTITION)
    assert (part.name, part.is_default, part.is_up, part.max_nodes) == ("gpu", True, True, 16)
    assert part.max_time == 2 * 86400
    assert part.nodes == ("gpu07", "gpu08", "gpu09", "gpu12")
    endless = cluster.parse_partition(
        PARTITION.replace("2-00:00:00", "UNLIMITED").replace("MaxNodes=16", "MaxNodes=UNLIMITED")
    )
    assert (endless.max_time, endless.max_nodes) == (None, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu:8", (8, "")),
        ("gpu:a100:4(S:0-1),gpu:a100:4,nvme:1", (8, "a100")),
        ("craynetwork:4,gpu:mi250:8", (8, "mi250")),
        ("gpu:h100_1g.10gb:7", (7, "h100_1g.10gb")),
        ("gpu", (1, "")),
        ("(null)", (0, "")),
        ("", (0, "")),
    ],
)
def test_a_gres_tells_number_and_type_of_gpus(text: str, found: tuple[int, str]) -> None:
    assert cluster.parse_gres(text) == found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
        ("INFINITE", None),
        ("", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert cluster.parse_time(text) == seconds


def test_squeues_lines_are_read_whatever_a_jobs_name_holds() -> None:
    said = (
        "17|PENDING|Resources||2026-11-20T18:32:23|N/A|10:00|2026-11-20T17:32:23|my|odd name\n"
        "18_2|RUNNING|None|gpu[07-08]|2026-11-20T18:32:23|2026-11-21T18:32:23|23:59:00|2026-11-20T17:32:23|x\n"
        "slurm_load_jobs warning: something\n"
    )
    first, second = cluster.parse_jobs(said)
    assert (first.id, first.name, first.is_queued, first.is_running) == ("17", "my|odd name", True, False)
    assert first.words == (
        "queued: it is next, and waits for nodes to become free (Resources); expected to start at 2026-11-20T18:32:23"
    )
    assert (second.id, second.words, second.is_running) == ("18_2", "running on gpu[07-08]", True)
    assert second.began is not None
    assert Job(id="1", state="PENDING").began is None


def test_reasons_and_ends_are_told_in_words_and_an_unknown_one_as_it_is() -> None:
    assert reason_words("QOSMaxGRESPerUser").startswith("a limit of your account or quality of service")
    assert reason_words("(Priority)") == "other jobs come first (Priority)"
    assert reason_words("SomethingNew") == "SLURM says so (SomethingNew)"
    assert end_words("TIMEOUT", "TimeLimit").startswith("its job reached its time limit; submit again with more --time")
    assert end_words("NEWSTATE", "None") == "its job ended as NEWSTATE (NEWSTATE)"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "sbatch: error: invalid partition specified: nowhere\nsbatch: error: Batch job submission failed: Invalid "
            "partition name specified\n",
            "sbatch: invalid partition specified: nowhere; `sinfo` lists the partitions; give one with --partition",
        ),
        (
            "sbatch: unrecognized option '--blah'\nTry \"sbatch --help\" for more information\n",
            "sbatch: unrecognized option '--blah'; see `sbatch --help`",
        ),
        (
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
            "sbatch: slurm_load_jobs error: Unable to contact slurm controller (connect failure); SLURM's controller "
            "does not answer: see `scontrol ping`, and try again later",
        ),
        (
            "slurm_load_jobs error: Socket timed out on send/recv operation\n",
            "sbatch: slurm_load_jobs error: Socket timed out on send/recv operation; SLURM's controller does not "
            "answer: see `scontrol ping`, and try again later",
        ),
        ("", "sbatch: it said nothing; see `sbatch --help`"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(said: str, told: str) -> None:
    assert refusal("sbatch", said) == told


def answering(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str = "") -> list[Sequence[str]]:
    asked: list[Sequence[str]] = []

    def run(argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        return subprocess.CompletedProcess(argv, code, out, err)

    monkeypatch.setattr(cluster.subprocess, "run", run)
    return asked


def test_a_federations_answer_holds_the_number_too(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 0, "4711;west\n")
    assert cluster.submit("#!/bin/bash\n") == "4711"


def test_an_answer_without_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 0, "welcome to the cluster\n")
    with pytest.raises(ClusterError, match="'welcome to the cluster' in place of a job's number"):
        cluster.submit("#!/bin/bash\n")


def test_a_job_that_slurm_has_forgotten_is_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 1, "", "slurm_load_jobs error: Invalid job id specified\n")
    assert cluster.jobs(["17"]) == {}
    cluster.cancel("17")


def test_nothing_is_asked_about_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, 0, "")
    assert cluster.jobs([]) == {}
    assert asked == []


def test_a_controller_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: Sequence[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(argv, 60)

    monkeypatch.setattr(cluster.subprocess, "run", run)
    with pytest.raises(ClusterError, match="squeue said nothing for 60 s; see `scontrol ping`"):
        cluster.jobs(["1"])


def test_reasons_whose_words_say_never_are_those_of_a_job_that_never_starts() -> None:
    for reason, words in REASONS.items():
        assert ("never start" in words) == Job(id="1", state="PENDING", reason=f"({reason})").never_starts, reason
    assert not Job(id="1", state="RUNNING", reason="PartitionConfig").never_starts
