"""metaseq-api-slurm on a real SLURM: submitted, waited for, asked, found again, stopped, and nothing left."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm
from support.manage import Manage, answers, job_of, processes_of
from support.processes import TESTS, until

from metaseq_api.launch import cluster, sbatch, service
from metaseq_api.launch.registry import Registry

pytestmark = pytest.mark.slurm

ANSWER = " string of the string.\n\nIf the string is specified, the string is returned."


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """Four nodes of two GPUs and 64 CPUs."""
    yield from slurm.cluster(nodes=4, gpus=2, cpus=64)


def test_submit_waits_and_prints_what_answers(manage: Manage, registry: Registry) -> None:
    flags = ["--nodes", "2", "--gpus", "2", "--model-parallel", "4", "--cpus-per-task", "2", "--time", "10"]
    code, out, err = manage("submit", *flags, "--name", "demo.1", "--", "--device", "cpu")
    assert code == 0, err
    url, curl, ssh = out.splitlines()
    assert re.fullmatch(r"http://fake\d:\d+", url)
    said = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(said)["choices"][0]["text"]
    host = url.removeprefix("http://")
    assert re.fullmatch(rf"from your own machine: ssh -N -L 6010:{host} \S+@\S+", ssh)
    assert "plan: tensor parallel over 4 rank(s): 2 node(s) x 2 GPU(s)" in err
    assert "running on fake" in err or "loading" in err

    key = (registry.path("demo.1") / "key").read_text().strip()
    assert err.count(key) == 1
    body = json.dumps({"prompt": "Return the", "max_tokens": 32, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=60) as r:
        assert json.load(r)["choices"][0]["text"] == ANSWER

    assert manage("url", "demo.1")[:2] == (0, url + "\n")
    code, out, _ = manage("status", "demo.1", "--json")
    facts = json.loads(out)
    assert (code, facts["state"], facts["url"], facts["model"]) == (0, "ready", url, "demo")
    assert f"ready on {url}" in manage("list")[1]
    assert "ready on http" in manage("logs", "demo.1")[1]
    assert manage("stop", "demo.1")[:2] == (0, "demo.1 is stopped\n")
    assert not answers(int(host.rpartition(":")[2]))
    assert manage("status", "demo.1")[0] == 31


def test_a_service_that_ends_before_it_is_ready_is_told_by_its_own_words(manage: Manage, registry: Registry) -> None:
    code, out, err = manage("submit", "--gpus", "0", "--name", "a", "--", "--max-seq-len", "99999")
    assert (code, out) == (31, "")
    assert "a ended before it was ready: " in err
    assert "MAX_SEQ_LEN (--max-seq-len) is 99999" in err
    code, out, _ = manage("status", "a")
    assert code == 31
    assert "ended" in out
    code, _, err = manage("url", "a")
    assert code == 31
    assert "a is not ready" in err
    assert "MAX_SEQ_LEN" in manage("logs", "--follow", "a")[1]
    assert "a had ended already" in manage("stop", "a")[1]


def test_a_name_is_taken_while_its_service_lives_and_free_once_it_ended(
    manage: Manage, registry: Registry, light: list[str]
) -> None:
    assert manage(*light, "--name", "a")[0] == 0
    first = job_of(registry, "a")
    code, _, err = manage(*light, "--name", "a")
    assert code == 31
    assert f"there is a service a already, job {first}: ready on" in err
    assert job_of(registry, "a") == first
    cluster.cancel(first)
    until(lambda: service.look(registry, "a").has_ended, "the service to be gone")
    code, _, err = manage(*light, "--name", "a")
    assert code == 0, err
    assert job_of(registry, "a") != first


def test_a_service_that_ends_before_it_keeps_a_record_is_told_by_the_last_error_of_its_log(
    manage: Manage, light: list[str]
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        code, _, err = manage(*light, "--name", "a", "--port", str(other.getsockname()[1]))
    assert code == 31
    assert "its job failed (FAILED, NonZeroExitCode); metaseq-api-local: error: port " in err


def test_fifty_services_started_at_once_on_one_node_have_a_port_each(
    manage: Manage, registry: Registry, light: list[str]
) -> None:
    names = [f"s{i}" for i in range(50)]
    for name in names:
        code, _, err = manage(*light, "--name", name, "--no-wait", "--nodelist", "fake1", "--cpus-per-task", "1")
        assert code == 0, err

    def ready() -> bool:
        standings = service.look_at_all(registry)
        assert not [s.words for s in standings if s.has_ended]
        return [s.state for s in standings] == ["ready"] * 50

    until(ready, "fifty services to be ready", 150)
    records = [registry.records(name)[0] for name in names]
    assert len({r.port for r in records}) == 50
    assert {r.node for r in records} == {"fake1"}
    for r in records:
        with socket.create_connection((r.host, r.port), timeout=10) as s:
            assert s.recv(100).decode() == r.name


def test_a_service_on_four_nodes_has_one_record_and_ends_as_a_whole(
    manage: Manage, registry: Registry, light: list[str]
) -> None:
    code, out, err = manage(*light, "--nodes", "4", "--model-parallel", "4", "--name", "wide")
    assert code == 0, err
    assert [(r.node, r.state) for r in registry.records("wide")] == [("fake1", "ready")]
    assert out.startswith("http://fake1:")
    assert manage("stop", "wide")[0] == 0
    until(lambda: not processes_of(registry), "the ranks of every node to be gone", 20)


def test_a_service_that_was_killed_is_told_as_ended_though_its_record_says_ready(
    manage: Manage, registry: Registry, light: list[str]
) -> None:
    assert manage(*light, "--name", "a", "--no-requeue")[0] == 0
    (rank,) = [p for p in processes_of(registry) if p.cmdline()[-1] == "rank0/1"]
    rank.kill()
    standing = until(lambda: (s := service.look(registry, "a")).has_ended and s, "SLURM to see it")
    assert registry.records("a")[0].state == "ready"
    assert "its job failed (FAILED, NonZeroExitCode)" in standing.words
    assert "was killed by SIGKILL" in manage("logs", "a")[1]


def test_a_requeued_service_is_queued_and_then_ready_under_its_name(
    manage: Manage, registry: Registry, light: list[str]
) -> None:
    assert manage(*light, "--name", "a", "--requeue")[0] == 0
    before = registry.records("a")[0]
    subprocess.run(["scontrol", "requeue", job_of(registry, "a")], timeout=20, check=True)
    until(lambda: service.look(registry, "a").state == "queued", "SLURM to requeue it")
    until(lambda: service.look(registry, "a").state == "ready", "it to come back", 60)
    after = registry.records("a")[0]
    assert after.started > before.started
    assert after.job == before.job


def test_why_a_job_waits_is_told_in_words(manage: Manage, light: list[str]) -> None:
    assert manage(*light, "--name", "a", "--no-wait", "--hold")[0] == 0
    code, out, _ = manage("status", "a")
    assert code == 0
    assert "queued: it is held; `scontrol release JOB` lets it go (JobHeldUser)" in out


@pytest.mark.parametrize("cancels", [False, True])
def test_ctrl_c_while_waiting_leaves_the_job_unless_told_otherwise(
    manage: Manage, registry: Registry, light: list[str], cancels: bool
) -> None:
    argv = [*light, "--name", "a", "--hold", *(["--cancel-on-interrupt"] if cancels else [])]
    waiting = subprocess.Popen(
        [sys.executable, "-m", "metaseq_api.slurm.manage", *argv], stderr=subprocess.PIPE, text=True
    )
    assert waiting.stderr
    seen = ""
    while "queued" not in seen:
        line = waiting.stderr.readline()
        assert line, seen
        seen += line
    job = job_of(registry, "a")
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert ("is cancelled" if cancels else f"job {job} goes on: metaseq-api-slurm status a") in err
    assert cluster.jobs([job])[job].is_queued is not cancels
    assert registry.names() == ([] if cancels else ["a"])


def test_what_slurm_refuses_leaves_nothing_behind(manage: Manage, registry: Registry, light: list[str]) -> None:
    code, _, err = manage(*light, "--name", "a", "--partition", "nowhere")
    assert code == 30
    assert "invalid partition specified: nowhere; `sinfo` lists the partitions" in err
    code, _, err = manage(*light, "--name", "a", "--mem", "999gb")
    assert code == 30
    assert "`metaseq-api-slurm doctor` shows what nodes have" in err
    assert registry.names() == []


def test_a_key_is_for_its_user_alone(manage: Manage, registry: Registry, light: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("correct-horse-battery\n")
    code, out, err = manage(*light, "--name", "a", "--key-file", str(tmp_path / "mine"))
    assert code == 0, err
    job = job_of(registry, "a")
    assert (registry.path("a") / "key").read_text() == "correct-horse-battery\n"
    assert oct((registry.path("a") / "key").stat().st_mode & 0o777) == "0o600"
    assert oct(registry.folder.stat().st_mode & 0o777) == "0o700"
    shown = subprocess.run(["scontrol", "show", "job", "-d", job], capture_output=True, text=True, check=True).stdout
    ranks = [" ".join(p.cmdline()) for p in processes_of(registry)]
    assert ranks
    log = registry.log_file("a", job).read_text()
    records = [p.read_text() for p in registry.path("a").glob("*.json")]
    assert "correct-horse-battery" not in "".join([out, err, shown, log, *records, *ranks])


def test_options_of_sbatch_reach_slurm(manage: Manage, registry: Registry, light: list[str]) -> None:
    comment = "two words, 100 % # it's \\ odd"
    assert manage(*light, "--name", "a", "--no-wait", "--hold", "-t", "7", "--comment", comment, "--requeue")[0] == 0
    said = subprocess.run(
        ["scontrol", "show", "job", job_of(registry, "a")], capture_output=True, text=True, check=True
    ).stdout
    assert "TimeLimit=00:07:00" in said
    assert "Requeue=1" in said
    assert f"Comment={comment}" in said


def test_every_option_of_this_sbatch_is_known(manage: Manage) -> None:
    said = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"^\s+(?:-\w,? +)?--([a-z][a-z-]+)", said, re.MULTILINE))
    assert len(offered) > 60
    ours = {"nodes", "gpus", "help", "usage", "version", "verbose"}
    assert offered - {*sbatch.VALUED, *sbatch.OPTIONAL, *sbatch.BARE, *sbatch.OURS} == ours


def test_doctor_finds_a_good_site_good(manage: Manage, registry: Registry) -> None:
    code, out, err = manage("doctor", str(TESTS.parent / "metaseq_api" / "demo"), "--nodes", "2")
    assert code == 0, out + err
    assert "OK      partition main: 4 of 4 nodes usable, no time limit; 2 GPUs, 64 CPUs, 4 GiB a node" in out
    assert "OK      trial job ran on fake1, fake2" in out
    assert "OK      the nodes reach each other over TCP (2 ways)" in out
    assert "OK      fake2: 8 checkpoint files, 0 unreadable" in out
    assert "OK      HAProxy, for `metaseq-api-slurm proxy`: /" in out or "OK      no HAProxy here; only" in out
    assert out.endswith("this site is ready\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/nowhere/opt"], "PROBLEM fake1: 1 checkpoint files, 1 unreadable opt: No such file or directory: put it in"),
        (["--gpus", "2"], "torch sees fewer GPUs than SLURM gives"),
        (["--python", "/nowhere/python"], "is /nowhere/python (with metaseq-api) there on every node"),
        (["--partition", "nowhere", "--no-job"], "PROBLEM there is no partition nowhere: give one of main"),
        (["--nodes", "9", "--wait-s", "60"], "of this kind: it will never start (PartitionConfig): ask for less"),
        (["--mem", "999gb"], "PROBLEM the trial job cannot be submitted: sbatch: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_doctor_names_what_is_wrong(manage: Manage, argv: list[str], said: str) -> None:
    code, out, _ = manage("doctor", *([] if "--nodes" in argv else ["--nodes", "1"]), *argv)
    assert code == 1
    assert said in out


def test_doctor_says_when_slurm_is_not_there(manage: Manage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scancel = shutil.which("scancel")
    with monkeypatch.context() as m:
        m.setenv("PATH", str(tmp_path))
        code, out, _ = manage("doctor")
        refused, _, err = manage("submit")
    assert scancel
    assert code == 1
    assert "PROBLEM SLURM's commands: missing sbatch, srun, squeue" in out
    assert refused == 30
    assert "is not found; run this on a login node" in err
