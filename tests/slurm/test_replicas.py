"""Several members behind one address, on a real SLURM, by a real HAProxy: joined, left, killed, under load."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import slurm
from support.load import Asker, Load
from support.manage import Manage, job_of, processes_of
from support.processes import until
from support.proxy import Proxy, need_haproxy

from metaseq_api.launch import cluster, service
from metaseq_api.launch.registry import Registry

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

SHORT = {"prompt": "Return the", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
LONG = {"prompt": "Return the", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    """Four nodes of four CPUs, and SLURM's own KillWait."""
    need_haproxy(install=True)
    yield from slurm.cluster(nodes=4, gpus=0, cpus=4, kill_wait_s=30)


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    """Those that a test started; all are ended."""
    started: list[Proxy] = []
    yield started
    for proxy in started:
        proxy.end()


def submit(manage: Manage, registry: Registry, replicas: int, *more: str) -> str:
    """A service of so many members that are all ready; its key."""
    flags = ["--gpus", "0", "--name", "a", "--replicas", str(replicas), "--time", "30", *more]
    code, _, err = manage("submit", *flags)
    assert code == 0, err
    until(lambda: num_ready(registry) == replicas, "every member to be ready", 90)
    return (registry.path("a") / "key").read_text().strip()


def num_ready(registry: Registry) -> int:
    return sum(m.state == "ready" for m in service.look(registry, "a").members)


def answered_by(registry: Registry, member: int) -> int:
    """Completions that a member has answered, by its log."""
    (path,) = service.log_files(service.look(registry, "a"), member)
    return len(re.findall(r"POST /v1/completions 200", path.read_text()))


def kill_member(registry: Registry, member: int) -> None:
    """All processes of one member's service, at once; its batch script is left to notice."""
    job = service.look(registry, "a").members[member].job
    number = job.partition("_")[2]
    doomed = []
    for p in processes_of(registry):
        with contextlib.suppress(psutil.Error):
            mine = p.environ().get("SLURM_ARRAY_TASK_ID") == number
            if mine and any(word in ("metaseq_api.host", "metaseq_api.cli.interactive_hosted") for word in p.cmdline()):
                doomed.append(p)
    assert doomed
    for p in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.send_signal(signal.SIGKILL)


def test_three_members_behind_one_address_share_a_key_and_the_work(
    manage: Manage, registry: Registry, proxies: list[Proxy]
) -> None:
    key = submit(manage, registry, 3)
    jobs = [f"{job_of(registry, 'a')}_{n}" for n in range(3)]
    assert [m.job for m in service.look(registry, "a").members] == jobs
    proxies.append(Proxy("a"))
    url = proxies[0].url
    until(lambda: proxies[0].text.count(": ready 127.0.0.1:") == 3, "three members to be in")
    assert manage("url", "a")[:2] == (0, url + "\n")
    code, out, _ = manage("status", "a")
    assert code == 0
    assert f"3 of 3 ready behind {url}" in out
    assert [line.split()[3] for line in out.splitlines() if line.startswith("  member")] == jobs
    facts = json.loads(manage("status", "a", "--json")[1])
    assert (facts["url"], [m["state"] for m in facts["members"]]) == (url, ["ready"] * 3)

    assert Asker(url, "not-the-key-at-all").complete(**SHORT) == "401 invalid_api_key"
    load = Load(Asker(url, key), 12, **SHORT)
    try:
        until(lambda: load.all["answered"] > 100, f"answers: {load.all}", 60)
    finally:
        assert set(load.end()) == {"answered"}
    shares = [answered_by(registry, n) for n in range(3)]
    assert all(shares), shares  # who is slower, as all on two cores are in turn, gets less
    logs = manage("logs", "a")[1]
    assert all(f"==> a-{job}.log <==" in logs for job in jobs)
    assert "==>" not in manage("logs", "a", "--member", "2")[1]
    assert manage("logs", "a", "--member", "7")[0] == 31

    assert manage("stop", "a")[:2] == (0, "a is stopped\n")
    assert proxies[0].process.wait(30) == 0
    assert "a was stopped: nobody new is let in" in proxies[0].text


def test_the_proxy_as_a_job_of_its_own_is_found_and_stopped_with_the_service_after_its_last_stream(
    manage: Manage, registry: Registry
) -> None:
    key = submit(manage, registry, 2)
    code, _, err = manage("proxy", "a", "--job", "--time", "30")
    assert code == 0, err
    assert manage("proxy", "a", "--job")[0] == 31
    found = until(lambda: (s := service.look(registry, "a")).proxy and s.proxy, "it to be up", 60)
    assert re.fullmatch(r"http://fake\d:\d+", found.url)
    assert manage("url", "a")[1] == found.url + "\n"
    until(lambda: Asker(found.url, key).complete(**SHORT) == "answered", "the members to be in", 20)
    streams = Load(Asker(found.url, key), 4, **LONG)
    try:
        until(lambda: streams.all["answered"], "streams", 30)
        assert manage("stop", "a")[:2] == (0, "a is stopped\n")
    finally:
        streams.end()
    # one that the kernel had let in when HAProxy closed its door is reset or hung up on: the whole service was stopped
    ended = {how for how in streams.all if not how.startswith(("ConnectionResetError", "RemoteDisconnected"))}
    assert ended <= {"answered", "503 engine_stopped", "503 no_member", "refused"}, streams.all
    assert not [j for j in cluster.jobs([found.job]).values() if j.is_running or j.is_queued]
    assert "about" not in registry.log_file("a-proxy", found.job).read_text()


def test_a_member_that_ends_is_taken_out_and_no_request_or_stream_is_lost(
    manage: Manage, registry: Registry, proxies: list[Proxy]
) -> None:
    key = submit(manage, registry, 3)
    proxies.append(Proxy("a"))
    asker = Asker(proxies[0].url, key)
    short, streams = Load(asker, 20, **SHORT), Load(asker, 6, **LONG)
    try:
        until(lambda: short.all["answered"] > 60 and streams.all["answered"] > 2, "clients to be at it", 60)
        subprocess.run(["scancel", f"{job_of(registry, 'a')}_1"], check=True, timeout=20)
        until(lambda: num_ready(registry) == 2, "the member to go", 30)
        until(lambda: len(service.look(registry, "a").members) == 3 and ended(registry, 1), "its end", 60)
        before = short.all["answered"]
        until(lambda: short.all["answered"] > before + 60, "the others to go on", 60)
    finally:
        short.end(), streams.end()
    assert (set(short.all), set(streams.all)) == ({"answered"}, {"answered"}), (short.all, streams.all)
    assert "every running request was answered" in manage("logs", "a", "--member", "1")[1]


def ended(registry: Registry, member: int) -> bool:
    return service.look(registry, "a").members[member].has_ended


def test_a_member_that_is_killed_costs_a_client_one_request_at_most_and_is_back_without_a_restart(
    manage: Manage, registry: Registry, proxies: list[Proxy]
) -> None:
    key = submit(manage, registry, 3)
    proxies.append(Proxy("a"))
    haproxy = proxies[0].haproxy
    asker = Asker(proxies[0].url, key)
    short, streams = Load(asker, 20, **SHORT), Load(asker, 6, **LONG)
    try:
        until(lambda: short.all["answered"] > 60 and streams.all["answered"] > 2, "clients to be at it", 60)
        kill_member(registry, 1)
        before = short.all["answered"]
        until(lambda: short.all["answered"] > before + 100, "the others to go on", 60)
        worked = answered_by(registry, 1)
        until(lambda: num_ready(registry) == 3, "it to be back", 90)
        until(lambda: answered_by(registry, 1) > worked + 10, "it to work again", 60)
    finally:
        short.end(), streams.end()
    assert set(short.all) <= {"answered", "502 member_lost"}, short.all
    # a front end that outlives the rest for a moment tells its clients
    assert set(streams.all) <= {"answered", "502 member_lost", "broken stream", "told in the stream"}, streams.all
    assert max(c.total() - c["answered"] for c in short.found + streams.found) == 1, (short.all, streams.all)
    assert short.all.total() - short.all["answered"] < 20  # whoever was with another member saw nothing
    assert proxies[0].haproxy == haproxy
    print("short", short.all, "streams", streams.all)
