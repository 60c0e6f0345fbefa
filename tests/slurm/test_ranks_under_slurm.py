"""Under a real srun and sbatch: every task becomes the ranks it should be, and a step ends as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import slurm
from support.processes import Family, clean_env, family, until

from metaseq_api.launch.rendezvous import device_index

pytestmark = pytest.mark.slurm

DOOR = [sys.executable, "-m", "support.door", "--port", "0"]
TEMPLATE = Path(__file__).parents[2] / "slurm" / "hosted.sbatch"


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """Two nodes of two GPUs and four CPUs."""
    yield from slurm.cluster(nodes=2, gpus=2, cpus=4)


@contextlib.contextmanager
def srun(conf: Path, folder: Path, options: str, *argv: str, **env: str) -> Iterator[Family]:
    """A step of dummies, and a cluster without jobs afterwards."""
    more = {"SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1"} | env
    try:
        with family(["srun", "--immediate=20", *options.split(), *DOOR, *argv], folder, **more) as f:
            yield f
    finally:
        subprocess.run(["scancel", "--me"], env=clean_env(SLURM_CONF=str(conf)), timeout=20, check=False)


def ranks_of(conf: Path, folder: Path, options: str, num_ranks: int, *argv: str) -> list[dict[str, Any]]:
    """What each rank of such a step was told; all of them then end well."""
    with srun(conf, folder, options, *argv, DUMMY_ONCE="1") as f:
        told = f.up(num_ranks)
        code, err = f.end()
        assert code == 0, err
        f.assert_nothing_left()
    return told


def where(told: list[dict[str, Any]]) -> list[tuple[int, int, int, int, str]]:
    names = ("rank", "world_size", "local_rank", "local_world_size", "node")
    return [tuple(t["rank"][n] for n in names) for t in told]


def gpu(told: dict[str, Any]) -> str:
    """The GPU of its node that a rank would take."""
    visible = told["cuda"].split(",")
    return str(visible[device_index(told["rank"]["local_rank"], len(visible))])


def test_metaseqs_own_line_starts_a_rank_per_gpu_without_any_port(conf: Path, tmp_path: Path) -> None:
    options = "--ntasks-per-node 1 --gpus-per-node 2 --nodes 1 --cpus-per-task 2 --quit-on-interrupt --job-name genwork"
    told = ranks_of(conf, tmp_path, options, 2, "--model-parallel", "2")
    assert where(told) == [(0, 2, 0, 2, "fake1"), (1, 2, 1, 2, "fake1")]
    assert {t["rank"]["init"].split(":")[0] for t in told} == {"file"}
    assert [t["port"] is not None for t in told] == [True, False]
    assert [gpu(t) for t in told] == ["0", "1"]


def test_one_task_on_each_of_two_nodes_numbers_its_ranks_after_the_node(conf: Path, tmp_path: Path) -> None:
    told = ranks_of(conf, tmp_path, "-N2 --ntasks-per-node 1 --gpus-per-node 2", 4, "--model-parallel", "4")
    assert where(told) == [
        (0, 4, 0, 2, "fake1"),
        (1, 4, 1, 2, "fake1"),
        (2, 4, 0, 2, "fake2"),
        (3, 4, 1, 2, "fake2"),
    ]
    inits = {t["rank"]["init"] for t in told}
    assert len(inits) == 1
    assert inits.pop().startswith("step://fake1/")
    assert [t["port"] is not None for t in told] == [True, False, False, False]
    assert [gpu(t) for t in told] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("options", "seen"),
    [("--gpus-per-node 2", ["0,1", "0,1"]), ("--gpus-per-task 1", ["0", "1"]), ("--gpu-bind=single:1 -G2", ["0", "1"])],
    ids=["all tasks see all GPUs", "gpus-per-task", "gpu-bind"],
)
def test_a_task_per_gpu_takes_its_own_gpu(conf: Path, tmp_path: Path, options: str, seen: list[str]) -> None:
    told = ranks_of(conf, tmp_path, f"-N1 -n2 {options}", 2)
    assert where(told) == [(0, 2, 0, 2, "fake1"), (1, 2, 1, 2, "fake1")]
    assert [t["cuda"] for t in told] == seen
    assert [gpu(t) for t in told] == ["0", "1"]
    assert {t["rank"]["init"].rpartition("/")[0] for t in told} == {"step://127.0.0.1"}


def test_a_task_per_rank_on_two_nodes(conf: Path, tmp_path: Path) -> None:
    told = ranks_of(conf, tmp_path, "-N2 --ntasks-per-node 2", 4)
    assert where(told) == [
        (0, 4, 0, 2, "fake1"),
        (1, 4, 1, 2, "fake1"),
        (2, 4, 0, 2, "fake2"),
        (3, 4, 1, 2, "fake2"),
    ]
    assert {t["rank"]["init"].rpartition("/")[0] for t in told} == {"step://fake1"}


def test_neighbours_share_a_node_also_under_cyclic_distribution(conf: Path, tmp_path: Path) -> None:
    told = ranks_of(conf, tmp_path, "-N2 --ntasks-per-node 2 --distribution cyclic", 4)
    assert [w[4] for w in where(told)] == ["fake1", "fake1", "fake2", "fake2"]


def test_uneven_tasks_on_two_nodes(conf: Path, tmp_path: Path) -> None:
    told = ranks_of(conf, tmp_path, "-N2 -n3", 3)
    assert where(told) == [(0, 3, 0, 2, "fake1"), (1, 3, 1, 2, "fake1"), (2, 3, 0, 1, "fake2")]


def sbatch(conf: Path, folder: Path, *argv: str, **env: str) -> str:
    """Run a batch job to its end and return what it wrote."""
    job = ["sbatch", "--wait", "--quiet", "--output", str(folder / "log"), *argv]
    more = clean_env(SLURM_CONF=str(conf), DUMMY_DIR=str(folder), DUMMY_ONCE="1", **env)
    done = subprocess.run(job, env=more, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert done.returncode == 0, done.stderr + log
    return log


def told_in(folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(num_ranks)]


def test_a_batch_script_without_srun_starts_its_ranks_itself(conf: Path, tmp_path: Path) -> None:
    tests = str(TEMPLATE.parents[1] / "tests")
    wrapped = f"{' '.join(DOOR)} --model-parallel 2"
    sbatch(conf, tmp_path, "-N1", "--ntasks-per-node", "2", "--wrap", wrapped, PYTHONPATH=tests)
    told = told_in(tmp_path, 2)
    assert where(told) == [(0, 2, 0, 2, "fake1"), (1, 2, 1, 2, "fake1")]
    assert {t["rank"]["init"].split(":")[0] for t in told} == {"file"}


TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m support.door --port 0"


def test_torchrun_in_a_batch_script_counts_as_torchrun(conf: Path, tmp_path: Path) -> None:
    tests = str(TEMPLATE.parents[1] / "tests")
    sbatch(conf, tmp_path, "-N1", "--cpus-per-task", "2", "--wrap", TORCHRUN, PYTHONPATH=tests, OMP_NUM_THREADS="1")
    told = told_in(tmp_path, 2)
    assert where(told) == [(0, 2, 0, 2, "fake1"), (1, 2, 1, 2, "fake1")]
    assert {t["rank"]["init"].split(":")[0] for t in told} == {"agent"}


@pytest.mark.parametrize(
    ("line", "node", "init"),
    [
        (f"{' '.join(DOOR)} --model-parallel 2", "", "file"),
        (f"srun -n1 --gpus-per-node 2 {' '.join(DOOR)} --model-parallel 2", "fake1", "file"),
        (f"srun -n2 --gpus-per-task 1 {' '.join(DOOR)}", "fake1", "step"),
        (TORCHRUN, "", "agent"),
    ],
    ids=["alone", "srun, a task per node", "srun, a task per GPU", "torchrun"],
)
def test_inside_salloc(conf: Path, tmp_path: Path, line: str, node: str, init: str) -> None:
    """By itself a command runs where salloc was typed, and its ranks are its own; srun takes it to the node."""
    argv = ["salloc", "--quiet", "--immediate=20", "-N1", "--ntasks-per-node=2", "--gpus-per-node=2", *line.split()]
    with family(argv, tmp_path, SLURM_CONF=str(conf), DUMMY_ONCE="1", OMP_NUM_THREADS="1") as f:
        told = f.up(2)
        code, err = f.end()
        assert code == 0, err
        f.assert_nothing_left_running()
    here = node or socket.gethostname()
    assert where(told) == [(0, 2, 0, 2, here), (1, 2, 1, 2, here)]
    assert {t["rank"]["init"].split(":")[0] for t in told} == {init}


def test_the_end_of_an_salloc_ends_what_runs_in_it(conf: Path, tmp_path: Path) -> None:
    argv = ["salloc", "--quiet", "--immediate=20", "-N2", "srun", "--ntasks-per-node=1", *DOOR, "--model-parallel", "4"]
    with family(argv, tmp_path, SLURM_CONF=str(conf), OMP_NUM_THREADS="1") as f:
        f.up(4)
        subprocess.run(["scancel", "--me"], env=clean_env(SLURM_CONF=str(conf)), timeout=20, check=True)
        f.end()
        f.assert_nothing_left()


def test_the_sbatch_template_starts_the_door_once_per_node(conf: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/bash\n[ "$PYTHONSAFEPATH $1 $2" = "1 -m metaseq_api.cli.interactive_hosted" ] || exit 99\n'
        f'exec {sys.executable} -m support.door "${{@:3}}"\n'
    )
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    tests = str(TEMPLATE.parents[1] / "tests")
    options = ["--nodes", "2", "--gpus-per-node", "2", "--cpus-per-task", "2", str(TEMPLATE)]
    sbatch(conf, tmp_path, *options, "--port", "0", "--model-parallel", "4", PATH=path, PYTHONPATH=tests)
    told = told_in(tmp_path, 4)
    assert [w[0] for w in where(told)] == [0, 1, 2, 3]
    assert [w[4] for w in where(told)] == ["fake1", "fake1", "fake2", "fake2"]


def test_torchrun_on_each_node_of_a_job_counts_as_torchrun(conf: Path, tmp_path: Path) -> None:
    run = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend static --master-addr fake1"
    script = tmp_path / "each_node.sh"
    script.write_text(
        f"exec {sys.executable} {run} --master-port $((20000 + SLURM_JOB_ID)) --node-rank $SLURM_NODEID "
        "-m support.door --port 0\n"
    )
    more = {"SLURM_CONF": str(conf), "DUMMY_ONCE": "1", "OMP_NUM_THREADS": "1"}
    with family(["srun", "-N2", "--ntasks-per-node", "1", "bash", str(script)], tmp_path, **more) as f:
        told = f.up(2)
        code, err = f.end()
    assert code == 0, err
    assert where(told) == [(0, 2, 0, 1, "fake1"), (1, 2, 0, 1, "fake2")]


@pytest.mark.parametrize(
    ("options", "argv"),
    [("-N2 --ntasks-per-node 1", ["--model-parallel", "4"]), ("-N2 --ntasks-per-node 2", [])],
    ids=["task per node", "task per rank"],
)
def test_a_killed_rank_ends_the_step_on_every_node(conf: Path, tmp_path: Path, options: str, argv: list[str]) -> None:
    with srun(conf, tmp_path, f"-K {options}", *argv) as f:
        os.kill(f.up(4)[3]["pid"], signal.SIGKILL)
        code, err = f.end()
        assert code != 0
        if argv:
            assert "rank 3 of 4" in err
            assert "on fake2) was killed by SIGKILL" in err
        f.assert_nothing_left_running()


def test_scancel_ends_every_rank_and_leaves_no_file(conf: Path, tmp_path: Path) -> None:
    with srun(conf, tmp_path, "-N2 --ntasks-per-node 1", "--model-parallel", "4") as f:
        f.up(4)
        subprocess.run(["scancel", "--me"], env=clean_env(SLURM_CONF=str(conf)), timeout=20, check=True)
        f.end()
        f.assert_nothing_left()


def test_one_ctrl_c_ends_an_srun_with_quit_on_interrupt(conf: Path, tmp_path: Path) -> None:
    with srun(conf, tmp_path, "-N1 --ntasks-per-node 1 --quit-on-interrupt", "--model-parallel", "2") as f:
        f.up(2)
        os.kill(f.parent.pid, signal.SIGINT)
        f.end()
        f.assert_nothing_left()


def test_rank_0_ends_its_requests_with_followers_that_slurm_told_to_end_too(conf: Path, tmp_path: Path) -> None:
    with srun(conf, tmp_path, "-N1 -n2", DUMMY_RANK0="drain", DUMMY_RANK1="follow") as f:
        f.up(2)
        subprocess.run(["scancel", "--me"], env=clean_env(SLURM_CONF=str(conf)), timeout=20, check=True)
        until((tmp_path / "drained").exists, "rank 0 to end its requests")
        assert (tmp_path / "drained").read_text() == "SIGTERM with rank 1"
        f.end()
        f.assert_nothing_left_running()
