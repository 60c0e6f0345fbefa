"""The whole service under a real srun: one task per node or one per rank, on one node or two, one answer."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import slurm
from support.processes import clean_env, until
from support.service import Service

pytestmark = pytest.mark.slurm

QUESTION = {"prompt": "Return the", "max_tokens": 32, "temperature": 0}
ANSWER = [" string of the string.\n\nIf the string is specified, the string is returned."]


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """Two nodes of two GPUs and four CPUs."""
    yield from slurm.cluster(nodes=2, gpus=2, cpus=4)


def ranks_left(conf: Path) -> list[int]:
    """Processes of ours, on any of this cluster's nodes: they are all this machine."""
    found = []
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = {"metaseq_api.cli.interactive_hosted", "metaseq_api.host"} & set(p.cmdline())
            if ours and p.environ().get("SLURM_CONF") == str(conf):
                found.append(p.pid)
    return found


@pytest.mark.parametrize(
    "options",
    [
        "--nodes 1 --ntasks-per-node 1 --gpus-per-node 2 --cpus-per-task 2 --quit-on-interrupt --job-name genwork",
        "--nodes 1 --ntasks-per-node 2 --gpus-per-task 1",
        "--nodes 2 --ntasks-per-node 1 --gpus-per-node 1",
        "--nodes 2 --ntasks-per-node 2 --gpus-per-node 2",
    ],
    ids=["metaseq's line", "one task per GPU", "two nodes", "two nodes, one task per GPU"],
)
def test_srun_serves_and_a_cancelled_job_leaves_nothing(options: str, conf: Path, tmp_path: Path) -> None:
    ranks = 4 if "--nodes 2 --ntasks-per-node 2" in options else 2
    srun = [
        "srun",
        "--immediate=20",
        "-K",
        *options.split(),
        sys.executable,
        "-m",
        "metaseq_api.cli.interactive_hosted",
    ]
    arguments = ["--device", "cpu", "--model-parallel", str(ranks)]
    service = Service(tmp_path, *arguments, door=srun, SLURM_CONF=str(conf))
    try:
        assert service.texts(**QUESTION) == ANSWER
        subprocess.run(["scancel", "--me"], env=clean_env(SLURM_CONF=str(conf)), timeout=20, check=True)
        service.end(10)
        until(
            lambda: not ranks_left(conf), "the tasks of every node to be gone", 10
        )  # srun itself does not wait for them
    finally:
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGTERM)
        service.kill()
