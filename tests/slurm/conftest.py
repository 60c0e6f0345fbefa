"""metaseq-api-slurm in a registry of the test's own, of which nothing is left afterwards."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.manage import Manage, answers, processes_of
from support.processes import TESTS, clean_env, until

from metaseq_api.launch import service
from metaseq_api.launch.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "my 100% own's")


@pytest.fixture
def door() -> ModuleType:
    return importlib.import_module("metaseq_api.slurm.manage")


@pytest.fixture
def manage(
    conf: Path, registry: Registry, door: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Manage]:
    """Run a command: exit code, output, messages. Afterwards no job, process, port or file of a service is left."""
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("METASEQ_API_REGISTRY", str(registry.folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DUMMY_HOST", "support.registered_host")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.chdir(registry.folder.parent)

    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = door.main(list(argv))
        return (code, *capfd.readouterr())

    yield run
    ports = [r.port for name in registry.names() for r in registry.records(name)]
    subprocess.run(["scancel", "--me"], timeout=20, check=True)
    for name in registry.names():
        service.stop(registry, name)
    left = [p for p in registry.folder.rglob("*") if p.parent.name != "logs" and p.name != "logs"]
    assert left == []
    until(lambda: not processes_of(registry), "every process of every service to be gone", 20)
    assert not [port for port in ports if answers(port)]


@pytest.fixture
def light(tmp_path: Path) -> list[str]:
    """Flags of submit that have the nodes start a service without a model: up in half a second."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\nshift 2\nexec {sys.executable} -m support.door "$@"\n')
    python.chmod(0o755)
    return ["submit", "--gpus", "0", "--python", str(python)]
