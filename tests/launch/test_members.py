"""Several members under one name: which jobs they are, whose place is whose, and what is said of all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from metaseq_api.launch.cluster import Job
from metaseq_api.launch.members import find_all, judge_all, successor_of
from metaseq_api.launch.registry import Record, Registry, Submission, replace_json
from metaseq_api.launch.standing import STALE_S, Standing

NOW = 1_795_000_000.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "services")
    registry.open()
    registry.claim("a")
    return registry


def submitted(registry: Registry, replicas: int) -> None:
    registry.write_submission(
        Submission(name="a", job="17", model="opt", submitted=NOW, replicas=replicas, log="/logs/a-17.log")
    )


def succeeded(registry: Registry, member: int, job: str) -> None:
    registry.write_successor(Submission(name="a", job=job, model="opt", submitted=NOW + 60, member=member))


def says(registry: Registry, member: int, state: str, job: str, age: float = 1) -> None:
    told = Record(name="a", member=member, state=state, heartbeat=NOW - age, job=job, url=f"http://n{member}:1")
    replace_json(registry.member_file("a", member), dataclasses.asdict(told))


def fronted(registry: Registry, job: str | None = None, age: float = 1) -> None:
    told = Record(name="a", state="ready", heartbeat=NOW - age, job=job, url="http://login:6010")
    replace_json(registry.proxy_file("a"), dataclasses.asdict(told))


def standing(registry: Registry, **jobs: str) -> Standing:
    """The service, SLURM saying this of jobs: `_17_0="RUNNING"`."""
    found = find_all(registry, "a")
    assert found
    known = {n[1:]: Job(id=n[1:], state=state, reason="Priority", nodes="n1") for n, state in jobs.items()}
    return judge_all(found, known, NOW)


def test_a_plain_job_has_one_member_and_its_own_words(registry: Registry) -> None:
    submitted(registry, 0)
    says(registry, 0, "ready", "17")
    found = standing(registry, _17="RUNNING")
    assert (found.state, found.url, found.words, found.job) == ("ready", "http://n0:1", "ready on http://n0:1", "17")
    assert [m.log for m in found.members] == ["/logs/a-17.log"]


def test_the_elements_of_an_array_are_members_each_with_its_job_and_log(registry: Registry) -> None:
    submitted(registry, 3)
    says(registry, 0, "ready", "17_0")
    says(registry, 1, "loading", "17_1")
    found = standing(registry, _17_0="RUNNING", _17_1="RUNNING", _17_2="PENDING")
    assert [(m.member, m.job, m.state) for m in found.members] == [
        (0, "17_0", "ready"),
        (1, "17_1", "loading"),
        (2, "17_2", "queued"),
    ]
    assert found.members[2].log == str(registry.folder / "logs" / "a-17_2.log")
    assert (found.state, found.url, found.job) == ("ready", "http://n0:1", "17")
    assert found.words == (
        "1 of 3 ready http://n0:1; member 1 loading: 0 % at 0.00 GB/s a rank; "
        "member 2 queued: other jobs come first (Priority)"
    )


def test_the_address_is_the_proxys_while_that_runs(registry: Registry) -> None:
    submitted(registry, 2)
    says(registry, 1, "ready", "17_1")
    jobs = {"_17_0": "RUNNING", "_17_1": "RUNNING"}
    fronted(registry)
    assert standing(registry, **jobs).url == "http://login:6010"
    assert "1 of 2 ready behind http://login:6010" in standing(registry, **jobs).words
    fronted(registry, age=STALE_S + 1)
    assert standing(registry, **jobs).url == "http://n1:1"
    fronted(registry, job="18")
    assert standing(registry, **jobs, _18="RUNNING").url == "http://login:6010"
    assert standing(registry, **jobs, _18="CANCELLED").url == "http://n1:1"
    says(registry, 1, "loading", "17_1")
    assert standing(registry, **jobs, _18="RUNNING").url == ""


def test_a_service_has_ended_when_every_member_has(registry: Registry) -> None:
    submitted(registry, 2)
    says(registry, 0, "ended", "17_0")
    assert not standing(registry, _17_0="FAILED", _17_1="PENDING").has_ended
    found = standing(registry, _17_0="FAILED", _17_1="CANCELLED")
    assert found.has_ended
    assert len(found.members) == 2


def test_a_successor_has_the_place_of_whom_it_follows_and_back(registry: Registry) -> None:
    assert [successor_of(n, 3) for n in range(6)] == [3, 4, 5, 0, 1, 2]
    assert [successor_of(n, 1) for n in range(2)] == [1, 0]
    submitted(registry, 1)
    says(registry, 0, "ready", "17_0")
    succeeded(registry, 1, "18_1")
    both = standing(registry, _17_0="RUNNING", _18_1="PENDING")
    assert [(m.job, m.state) for m in both.members] == [("17_0", "ready"), ("18_1", "queued")]
    says(registry, 1, "ready", "18_1")
    says(registry, 0, "draining", "17_0")
    assert standing(registry, _17_0="RUNNING", _18_1="RUNNING").url == "http://n1:1"
    says(registry, 0, "ended", "17_0")
    alone = standing(registry, _17_0="COMPLETED", _18_1="RUNNING")
    assert [m.job for m in alone.members] == ["18_1"]
    assert (alone.state, alone.url) == ("ready", "http://n1:1")
    succeeded(registry, 0, "19_0")
    assert standing(registry, _18_1="RUNNING", _19_0="PENDING").members[0].state == "queued"


def test_the_record_of_an_earlier_member_is_not_taken_for_that_of_a_new_one_of_its_number(registry: Registry) -> None:
    submitted(registry, 1)
    succeeded(registry, 0, "19_0")
    says(registry, 0, "ready", "17_0")
    assert standing(registry, _19_0="RUNNING").state == "starting"
