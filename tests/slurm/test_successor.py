"""Members whose time runs out, on a real SLURM: the next job is there before, and whoever asks sees no gap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm
from support.load import Asker, Load
from support.manage import Manage, job_of
from support.processes import until
from support.proxy import Proxy, need_haproxy

from metaseq_api.launch import cluster, service
from metaseq_api.launch.registry import Registry

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

SHORT = {"prompt": "Return the", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
LONG = {"prompt": "Return the", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
# two minutes: SLURM looks at time limits every 30 s and sends its signal so much too early; of one minute that is half,
# when the next job is submitted
SUBMIT = ["submit", "--gpus", "0", "--name", "a", "--time", "2", "--signal", "B:USR1@2", "--successor"]


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """Two nodes of four CPUs, and SLURM's own KillWait."""
    need_haproxy(install=True)
    yield from slurm.cluster(nodes=2, gpus=0, cpus=4, kill_wait_s=30)


def states(registry: Registry) -> dict[int, str]:
    return {m.member: m.state for m in service.look(registry, "a").members}


def test_the_next_job_is_ready_before_this_one_goes_and_nobody_who_asks_the_proxy_sees_it(
    manage: Manage, registry: Registry
) -> None:
    code, out, err = manage(*SUBMIT)
    assert code == 0, err
    first = out.splitlines()[0]
    key = (registry.path("a") / "key").read_text().strip()
    proxy = Proxy("a")
    asker = Asker(proxy.url, key)
    short, streams = Load(asker, 8, **SHORT), Load(asker, 3, **LONG)
    try:
        until(lambda: short.all["answered"] > 20, f"clients to be at it {short.all}", 60)
        until(lambda: states(registry).get(1) == "ready", "the next one to be ready", 90)
        assert states(registry) == {0: "ready", 1: "ready"}
        (next_job,) = registry.successors("a")
        until(lambda: states(registry) == {1: "ready"}, "the first one to go", 60)
        before = short.all["answered"]
        until(lambda: short.all["answered"] > before + 40, "the next one to answer", 60)
    finally:
        short.end(), streams.end()
        url = manage("url", "a")[1].strip()
        listed = manage("list")[1]
        proxy.process.terminate()
        code = proxy.process.wait(30)
        proxy.end()
    assert (set(short.all), set(streams.all)) == ({"answered"}, {"answered"}), (short.all, streams.all)
    assert url == proxy.url
    assert code == 0
    assert f"1 of 1 ready behind {proxy.url}" in listed
    now = manage("url", "a")[1].strip()
    assert now not in (first, "")
    array = job_of(registry, "a")
    assert next_job.job != f"{array}_0"
    log = registry.log_file("a", f"{array}_0").read_text()
    assert f"job {next_job.job} is to take over as member 1" in log
    assert "every running request was answered" in log
    assert cluster.jobs([f"{array}_0"])[f"{array}_0"].state == "COMPLETED"
    assert manage("stop", "a")[0] == 0
    assert not [j for j in cluster.jobs([next_job.job]).values() if j.is_running or j.is_queued]


def test_a_next_job_that_waits_is_told_and_is_stopped_with_the_service(manage: Manage, registry: Registry) -> None:
    assert manage(*SUBMIT, "--exclusive", "--nodelist", "fake1")[0] == 0
    until(lambda: states(registry).get(1) == "queued", "the next one to wait", 90)
    code, out, _ = manage("status", "a")
    assert code == 0
    assert re.search(r"a +job \d+ +ready +1 of 1 ready http://fake1:\d+; member 1 queued: ", out)
    (next_job,) = registry.successors("a")
    assert manage("stop", "a")[:2] == (0, "a is stopped\n")
    assert not [j for j in cluster.jobs([next_job.job]).values() if j.is_running or j.is_queued]
