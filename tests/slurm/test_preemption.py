"""Pushed aside by jobs that come first, and at a real time limit, with clients at it: nobody is cut off."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm
from support.load import Asker, Load
from support.manage import Manage, job_of
from support.processes import until

from metaseq_api.launch import service
from metaseq_api.launch.registry import Registry

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SHORT = {"prompt": "Return the", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
SUBMIT = ["submit", "--gpus", "0", "--name", "a", "--cpus-per-task", "4"]
GOOD = {"answered", "503 engine_stopped", "refused"}


@pytest.fixture(scope="module", params=[("REQUEUE", 0), ("REQUEUE", 15), ("CANCEL", 15)], ids=str)
def conf(request: pytest.FixtureRequest) -> Iterator[Path]:
    """One node of four CPUs, with a partition whose jobs push those of the other aside."""
    mode, grace_time_s = request.param
    yield from slurm.cluster(nodes=1, gpus=0, cpus=4, kill_wait_s=30, preempt=mode, grace_time_s=grace_time_s)


def load_of(registry: Registry) -> Load:
    key = (registry.path("a") / "key").read_text().strip()
    load = Load(Asker(service.look(registry, "a").url, key), 10, **SHORT)
    until(lambda: load.all["answered"] > 30, f"clients to be at it: {load.all}", 60)
    return load


def test_a_service_that_is_preempted_loses_no_request_and_comes_back_under_its_name(
    manage: Manage, registry: Registry
) -> None:
    code, _, err = manage(*SUBMIT, "--time", "30")
    assert code == 0, err
    load = load_of(registry)
    try:
        urgent = ["sbatch", "--partition=urgent", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1"]
        subprocess.run(urgent, check=True, timeout=20, stdout=subprocess.DEVNULL)
        until(lambda: load.all["refused"] > 10, f"the door to be shut: {load.all}", 60)
    finally:
        load.end()
    assert set(load.all) <= GOOD, load.all
    log = registry.log_file("a", job_of(registry, "a"))
    assert "every running request was answered" in log.read_text()
    until(lambda: log.read_text().count("ready on http://") == 2, f"it to come back: {log.read_text()}", 90)
    until(lambda: service.look(registry, "a").state == "ready", "that to be told", 30)
    load_of(registry).end()
