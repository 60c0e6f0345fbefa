"""The end of a service that is a batch job: scancel, requeue, a signal beforehand, a dead node; with clients at it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import slurm
from support.processes import clean_env, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

TEMPLATE = Path(__file__).parents[2] / "slurm" / "hosted.sbatch"
NUM_CLIENTS = 50
TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """Two nodes of two GPUs, and SLURM's own KillWait."""
    yield from slurm.cluster(nodes=2, gpus=2, cpus=4, kill_wait_s=30)


class Job:
    """The template, submitted as it stands for a service on the demo model."""

    def __init__(self, conf: Path, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        (folder / "constants.py").write_text(f"TIMEOUT_S = {TIMEOUT_S}\n")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = clean_env(SLURM_CONF=str(conf), OMP_NUM_THREADS="1", PATH=path)
        wanted = ["--gpus-per-node=1", "--cpus-per-task=2", "--time=30", f"--output={self.log}", *options]
        argv = ["--device", "cpu", "--model-parallel", "2", "--port", str(self.port)]
        self.folder = folder
        self.job_id = self.run("sbatch", "--parsable", *wanted, str(TEMPLATE), *argv).strip()

    def run(self, *argv: str) -> str:
        done = subprocess.run(
            argv, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def ask(self) -> str:
        """One short request on a connection of its own: what came of it."""
        body = json.dumps({"prompt": "Return the", "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return "answered" if json.load(answer)["usage"]["completion_tokens"] == 8 else "cut short"
        except urllib.error.HTTPError as e:
            with e:
                return f"{e.code} after {e.headers.get('Retry-After')} s"
        except urllib.error.URLError as e:
            return "refused" if isinstance(e.reason, ConnectionRefusedError) else repr(e)
        except OSError as e:
            return repr(e)

    def wait_ready(self, times: int = 1) -> None:
        until(lambda: self.text.count("ready on http://") >= times, f"the service to be ready: {self.text}", 120)

    def state(self) -> str:
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", self.job_id))
        return found[1] if found else ""

    def processes(self) -> list[int]:
        found = []
        for p in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if p.environ().get("SLURM_JOB_ID") == self.job_id and p.status() != psutil.STATUS_ZOMBIE:
                    found.append(p.pid)
        return found


@pytest.fixture
def folder(tmp_path: Path, conf: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run(["scancel", "--me"], env=clean_env(SLURM_CONF=str(conf)), timeout=20, check=False)


class Clients:
    """Many that ask without a pause, until the test has seen enough."""

    def __init__(self, job: Job) -> None:
        self.found: Counter[str] = Counter()
        self.over = threading.Event()
        self._job, self._lock = job, threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self.over.is_set():
            what = self._job.ask()
            with self._lock:
                self.found[what] += 1
            if what != "answered":
                self.over.wait(0.1)  # as a client would that was told to try again later

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive()


@pytest.mark.parametrize("command", ["scancel", "scancel --batch --signal=USR1"])
def test_with_fifty_clients_the_end_of_a_job_loses_no_request(command: str, conf: Path, folder: Path) -> None:
    job = Job(conf, folder)
    job.wait_ready()
    clients = Clients(job)
    try:
        until(lambda: clients.found["answered"] > 2 * NUM_CLIENTS, "every client to be at it", 60)
        job.run(*command.split(), job.job_id)
        until(lambda: clients.found["refused"] > NUM_CLIENTS, f"the door to be shut: {clients.found}", 60)
    finally:
        clients.end()
    assert set(clients.found) <= {"answered", "503 after 5 s", "refused"}, (clients.found, job.text)
    until(lambda: not job.processes(), "every process to be gone", 60)
    assert re.search(r"SIG(TERM|USR1): \d+ running sequences have \d\d", job.text), job.text
    assert "every running request was answered" in job.text
    until(lambda: job.state() in ("CANCELLED", "COMPLETED"), f"the job's end, {job.state()}", 60)
    assert job.state() == ("CANCELLED" if command == "scancel" else "COMPLETED")


def test_a_requeued_job_comes_back_on_its_port_and_no_request_is_lost(conf: Path, folder: Path) -> None:
    job = Job(conf, folder)
    job.wait_ready()
    clients = Clients(job)
    try:
        until(lambda: clients.found["answered"] > 2 * NUM_CLIENTS, "every client to be at it", 60)
        job.run("scontrol", "requeue", job.job_id)
        until(lambda: clients.found["refused"] > NUM_CLIENTS, f"the door to be shut: {clients.found}", 60)
        before = clients.found["answered"]
        job.wait_ready(2)
        until(lambda: clients.found["answered"] > before + NUM_CLIENTS, f"new answers: {clients.found}", 60)
    finally:
        clients.end()
    assert set(clients.found) <= {"answered", "503 after 5 s", "refused"}, (clients.found, job.text)
    assert f"job {job.job_id} was started again by SLURM, time 1" in job.text


def test_a_node_that_dies_is_named_and_with_requeue_the_service_is_back_once_the_node_is(
    conf: Path, folder: Path
) -> None:
    job = Job(conf, folder, "--nodes=2")
    job.wait_ready()
    kill_node(conf, job, "fake2")
    until(
        lambda: re.search(r"error: lost rank 1 \(pid \d+ on fake2\)", job.text), f"its name: {job.text}", TIMEOUT_S + 10
    )
    until(lambda: "queued again (restart 1 of 5)" in job.text, f"the requeue: {job.text}", 90)
    job.run("scontrol", "update", "nodename=fake2", "state=down", "reason=test")
    subprocess.run(["slurmd", "-N", "fake2"], env=job.env, check=True, timeout=20)
    job.wait_ready(2)
    assert job.ask() == "answered"


def test_a_rank_that_is_held_on_another_node_is_named_with_its_stack_and_ends_the_job(conf: Path, folder: Path) -> None:
    job = Job(conf, folder, "--nodes=2", "--no-requeue")
    job.wait_ready()
    (held,) = [pid for pid in job.processes() if psutil.Process(pid).cmdline()[-1:] == ["rank1/2"]]
    os.kill(held, signal.SIGSTOP)
    named = rf"rank 1[^\n]*pid {held} on fake2[^\n]* stopped"
    until(lambda: re.search(named, job.text), f"its name: {job.text}", 2 * TIMEOUT_S + 20)
    until(lambda: "(most recent call first)" in job.text, f"its stack: {job.text}", 20)
    until(lambda: job.state() == "FAILED", "the job to end", 60)
    until(lambda: not job.processes(), "every process to be gone", 30)


def kill_node(conf: Path, job: Job, node: str) -> None:
    """All that SLURM and the job have on a node, at once."""
    daemon = int((conf.parent / f"slurmd-{node}.pid").read_text())
    doomed = []
    for pid in job.processes():
        process = psutil.Process(pid)
        if process.environ().get("SLURMD_NODENAME") == node:
            doomed += [pid, *(p.pid for p in process.parents() if p.name().startswith("slurmstepd"))]
    for pid in [daemon, *doomed]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
