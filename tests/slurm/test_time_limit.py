"""A real time limit, of one minute, with clients at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm
from support.load import Asker, Load
from support.manage import Manage, job_of
from support.processes import until

from metaseq_api.launch import cluster, service
from metaseq_api.launch.registry import Registry

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SHORT = {"prompt": "Return the", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
SUBMIT = ["submit", "--gpus", "0", "--name", "a", "--cpus-per-task", "2", "--time", "1"]
GOOD = {"answered", "503 engine_stopped", "refused"}


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """One node of eight CPUs, and SLURM's own KillWait."""
    yield from slurm.cluster(nodes=1, gpus=0, cpus=8, kill_wait_s=30)


@pytest.mark.parametrize(
    ("when", "state"),
    [("B:USR1@20", "COMPLETED"), ("B:URG@30", "TIMEOUT")],  # nobody hears SIGURG
    ids=["told before", "told by the limit itself"],
)
def test_at_a_time_limit_no_request_is_lost(manage: Manage, registry: Registry, when: str, state: str) -> None:
    code, _, err = manage(*SUBMIT, "--signal", when)
    assert code == 0, err
    key = (registry.path("a") / "key").read_text().strip()
    load = Load(Asker(service.look(registry, "a").url, key), 10, **SHORT)
    try:
        until(lambda: load.all["refused"] > 10, f"the door to be shut: {load.all}", 150)
    finally:
        load.end()
    assert set(load.all) <= GOOD, load.all
    assert load.all["answered"] > 100
    assert "every running request was answered" in registry.log_file("a", job_of(registry, "a")).read_text()
    job = job_of(registry, "a")
    until(lambda: not cluster.jobs([job])[job].is_running, "the job to end", 60)
    assert cluster.jobs([job])[job].state == state
    assert service.look(registry, "a").has_ended
