"""Who takes over: submitted once, awaited, tried again where it failed, and not submitted twice after a requeue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from metaseq_api.errors import ClusterError
from metaseq_api.launch import cluster
from metaseq_api.launch.cluster import Job
from metaseq_api.launch.countdown import Hooks
from metaseq_api.launch.registry import Record, Registry, Submission, replace_json, write_private
from metaseq_api.launch.successor import ATTEMPTS, MOST_LEAD_S, Succession, hooks_of
from metaseq_api.settings import Settings

NOW = 1_795_000_000.0


class Slurm:
    """SLURM's words as far as a member asks for them."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.submitted, self.cancelled, self.refusals = registry, [], [], 0
        self.states: dict[str, str] = {}
        self.becomes = "ready"

    def submit(self, script: str, argv: list[str], env: Mapping[str, str]) -> str:
        if self.refusals:
            self.refusals -= 1
            raise ClusterError("sbatch: no")
        self.submitted.append((script, argv, env))
        array = str(17 + len(self.submitted))
        number = argv[0].removeprefix("--array=")
        self.states[f"{array}_{number}"] = "RUNNING"
        told = Record(name="a", member=int(number), state=self.becomes, heartbeat=NOW, job=f"{array}_{number}")
        replace_json(self.registry.member_file("a", int(number)), dataclasses.asdict(told))
        return array

    def jobs(self, ids: list[str]) -> dict[str, Job]:
        return {i: Job(id=i, state=self.states[i]) for i in ids if i in self.states}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "services")
    registry.open()
    registry.claim("a")
    registry.write_submission(Submission(name="a", job="17", model="opt", submitted=NOW, replicas=2))
    write_private(registry.script_file("a"), "#!/bin/bash\n")
    return registry


@pytest.fixture
def slurm(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm(registry)
    monkeypatch.setattr(cluster, "submit", slurm.submit)
    monkeypatch.setattr(cluster, "jobs", slurm.jobs)
    monkeypatch.setattr(cluster, "cancel", slurm.cancelled.append)
    return slurm


def succession(registry: Registry, ends: list[str], member: int = 1) -> Succession:
    return Succession(
        registry=registry,
        name="a",
        member=member,
        replicas=2,
        end=lambda: ends.append("end"),
        sleep=lambda s: None,
        environment=lambda: {"HOME": "/home/me"},
    )


def test_the_same_script_is_submitted_as_the_next_member_and_this_one_ends_once_that_is_ready(
    registry: Registry, slurm: Slurm
) -> None:
    ends: list[str] = []
    succession(registry, ends).hand_over()
    assert slurm.submitted == [("#!/bin/bash\n", ["--array=3"], {"HOME": "/home/me"})]
    (written,) = registry.successors("a")
    assert (written.job, written.member) == ("18_3", 3)
    assert ends == ["end"]


def test_where_slurm_refuses_it_is_tried_again(registry: Registry, slurm: Slurm) -> None:
    ends: list[str] = []
    slurm.refusals = 5
    succession(registry, ends).hand_over()
    assert ends == ["end"]


def test_a_next_one_that_ends_before_it_is_ready_is_followed_by_another_but_not_for_ever(
    registry: Registry, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    slurm.becomes = "ended"
    monkeypatch.setattr(cluster, "jobs", lambda ids: {})
    succession(registry, ends).hand_over()
    assert len(slurm.submitted) == ATTEMPTS
    assert ends == []


def test_after_a_requeue_the_job_that_was_submitted_before_is_awaited(registry: Registry, slurm: Slurm) -> None:
    ends: list[str] = []
    succession(registry, ends).hand_over()
    succession(registry, ends).hand_over()
    assert len(slurm.submitted) == 1
    assert ends == ["end", "end"]


def test_the_number_of_one_that_has_not_ended_is_not_given_away(registry: Registry, slurm: Slurm) -> None:
    ends: list[str] = []
    succession(registry, ends).hand_over()  # 17_1, then 18_3, whose turn it is now
    slurm.states["17_1"] = "RUNNING"
    registry.write_successor(Submission(name="a", job="17_1", model="opt", submitted=NOW - 60, member=1))
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        slurm.states["17_1"] = "COMPLETED"

    dataclasses.replace(succession(registry, ends, member=3), sleep=sleep).hand_over()
    assert [argv for _, argv, _ in slurm.submitted] == [["--array=3"], ["--array=1"]]
    assert looks


def test_a_job_submitted_while_the_service_was_stopped_is_cancelled(
    registry: Registry, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_gone(script: str, argv: list[str], env: Mapping[str, str]) -> str:
        job = slurm.submit(script, argv, env)
        registry.forget("a")
        return job

    monkeypatch.setattr(cluster, "submit", then_gone)
    with pytest.raises(FileNotFoundError):
        succession(registry, []).hand_over()
    assert slurm.cancelled == ["18_3"]


def test_it_begins_at_half_of_the_time_an_hour_before_the_end_at_most_and_only_where_asked_for(tmp_path: Path) -> None:
    told = Settings(registry=tmp_path, service="a", successor=1)
    assert list(hooks_of(told, NOW + 600, NOW).at_seconds_left) == [300.0]
    assert list(hooks_of(told, NOW + 86400, NOW).at_seconds_left) == [MOST_LEAD_S]
    assert hooks_of(told, None) == Hooks()
    assert hooks_of(dataclasses.replace(told, successor=None), NOW + 600, NOW) == Hooks()
