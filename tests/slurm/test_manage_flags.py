"""metaseq-api-slurm without a SLURM: what it refuses in one line, and what it only plans."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
from support.processes import clean_env


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The door in an environment without launchers, SLURM or a registry."""
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return importlib.import_module("metaseq_api.slurm.manage")


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["submit", "--acount=x"], 2, "unrecognized arguments: --acount=x; did you mean --account?; see --help"),
        (["submit", "--output=x"], 2, "--output is not passed on to sbatch: `metaseq-api-slurm logs NAME` finds it"),
        (["submit", "--array=0-3"], 2, "--array is not passed on to sbatch: give --replicas, or one --name for"),
        (["submit", "--gpus", "0", "--replicas", "2", "--port", "6010"], 2, "--port 6010 cannot be had twice on one"),
        (
            ["submit", "--gpus", "0", "--successor", "--port", "6010"],
            2,
            "metaseq-api-slurm proxy` has a --port for",
        ),
        (["submit", "--gpus", "0", "--successor", "--time", "4"], 2, "--signal ends the service 120 s before the end"),
        (["submit", "--gpus", "0", "--port", "80000"], 2, "argument --port: '80000' is not a port from 1 to 65535"),
        (["proxy", "a", "--port", "-1"], 2, "argument --port"),
        (["submit", "--replicas", "0"], 2, "argument --replicas: '0' is not a number from 1 on"),
        (["proxy", "nobody"], 31, "there is no service nobody in "),
        (["proxy", "nobody", "--haproxy", "/nowhere/haproxy"], 8, "/nowhere/haproxy is not found here; have it"),
        (["proxy", "nobody", "--mem", "1gb"], 2, "--mem is for sbatch, and this proxy runs here; give --job too"),
        (["submit", "--partion", "gpu"], 2, "did you mean --partition?"),
        (["submit", "--nodes", "0"], 2, "argument -N/--nodes: '0' is not a number from 1 on"),
        (["submit", "--gpus", "0", "--name", "a/b", "--dry-run"], 2, "'a/b' cannot be a service's name"),
        (["submit", "/nowhere/opt", "--gpus", "0"], 3, "/nowhere does not exist"),
        (["submit", "--gpus", "0", "--key-file", "/nowhere/key"], 2, "the key file /nowhere/key cannot be read"),
        (["submit", "--gpus", "0", "--model-parallel", "3"], 6, "--model-parallel 3 does not divide"),
        (
            ["submit", "--gpus", "8", "--gpu-memory", "0.5"],
            10,
            "no tensor-parallel size that this model allows would fit",
        ),
        (["submit", "--gpus", "8"], 30, "scontrol is not found; run this on a login node of a SLURM cluster"),
        (["submit", "--gpus", "0"], 30, "sbatch is not found; run this on a login node of a SLURM cluster"),
        (["submit", "--gpus", "0", "--comment", "a\nb"], 2, "--comment holds a line break"),
        (["status", "nobody"], 31, "there is no service nobody in "),
        (["stop", "nobody"], 31, "there are: none"),
        (["url", "no/body"], 2, "'no/body' cannot be a service's name"),
        (["list", "--", "--dtype", "bf16"], 2, "what follows `--` is for metaseq-api-local, and list starts none"),
        (["lst"], 2, "invalid choice: 'lst'"),
        ([], 2, "the following arguments are required: command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line(
    door: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], code: int, said: str
) -> None:
    assert door.main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("metaseq-api-slurm: error: ")
    assert said in last
    services = tmp_path / ".metaseq-api" / "services"
    assert [p.name for p in services.glob("*")] in ([], ["logs"])


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    door: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [
        "submit",
        "--gpus",
        "4",
        "--gpu-memory",
        "80",
        "-p",
        "gpu",
        "-t",
        "30",
        "--nice",
        "--dry-run",
        "--",
        "--dtype",
        "bf16",
    ]
    assert door.main(argv) == 0
    out, err = capsys.readouterr()
    assert "plan: of 80 GiB a GPU: room for" in err
    for line in ("#SBATCH --partition=gpu", "#SBATCH --time=30", "#SBATCH --nice", "#SBATCH --gpus-per-node=1"):
        assert line in out.splitlines()
    assert " --device cuda " in out  # never a CPU instead, without a word
    assert " --service demo --dtype bf16 &\n" in out
    assert list(tmp_path.iterdir()) == []


def test_an_empty_registry_is_listed_as_nothing(door: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["list"]) == 0
    out, err = capsys.readouterr()
    assert (out, err.startswith("no services in ")) == ("", True)


def test_the_key_of_the_environment_is_checked_and_not_shown(
    door: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METASEQ_API_KEY", "two words")
    assert door.main(["submit", "--gpus", "0"]) == 2
    err = capsys.readouterr().err
    assert "METASEQ_API_KEY holds no usable key" in err
    assert "two words" not in err
