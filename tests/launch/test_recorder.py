"""The recorder: what a service says of itself, and that no disk can hold the service up."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import until
from support.service import Service

from metaseq_api.errors import CheckpointCorrupt
from metaseq_api.launch import recorder as module
from metaseq_api.launch.recorder import Recorder, recorded
from metaseq_api.launch.registry import Record, Registry
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.settings import Settings

RANK = RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, node="gpu07", init="file:///x")


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    registry = Registry(tmp_path)
    registry.claim("a")
    return Settings(registry=tmp_path, service="a", job="17", demo=True)


def test_a_service_tells_where_it_is_and_every_turn_of_its_life(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "a" / "member-0.json"
    with socket.create_server(("0.0.0.0", 0)) as sock, recorded(settings, RANK, sock) as recorder:
        until(lambda: read(path).get("state") == "starting", "the first word")
        port = sock.getsockname()[1]
        assert (read(path)["url"], read(path)["job"], read(path)["model"]) == (f"http://gpu07:{port}", "17", "demo")
        told = recorder.loading(200)
        until(lambda: read(path)["state"] == "loading", "loading")
        told(50)
        recorder.ready()
        until(lambda: read(path)["state"] == "ready", "ready")
        recorder.draining("told to")
        until(lambda: read(path)["state"] == "draining", "draining")
        assert read(path)["reason"] == "told to"
    assert (read(path)["state"], read(path)["reason"], read(path)["exit_code"]) == ("ended", "ended as told", 0)


def test_loading_tells_percent_and_rate_at_the_next_beat(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    recorder = Recorder(path, Record(name="a", state="starting", heartbeat=0), beat_s=0.01)
    recorder.loading(200)(50)
    until(lambda: read(path).get("percent") == 25.0, "a quarter")
    assert read(path)["rate"] > 0
    recorder.ended("", 0)


def test_a_heartbeat_goes_on_while_nothing_happens(tmp_path: Path) -> None:
    ticks = iter(range(1000000))
    record = Record(name="a", state="ready", heartbeat=0)
    recorder = Recorder(tmp_path / "r.json", record, clock=lambda: float(next(ticks)), beat_s=0.005)
    until(lambda: read(tmp_path / "r.json").get("heartbeat", 0) > 5, "some beats")
    recorder.ended("", 0)


def test_an_error_is_the_last_word_with_its_exit_code(settings: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with pytest.raises(CheckpointCorrupt), recorded(settings, RANK, sock):
            raise CheckpointCorrupt("part 1 is cut short")
        port = sock.getsockname()[1]
    found = read(tmp_path / "a" / "member-0.json")
    assert (found["state"], found["reason"], found["exit_code"]) == ("ended", "part 1 is cut short", 4)
    assert found["url"] == f"http://127.0.0.1:{port}"


def test_what_nobody_foresaw_is_the_last_word_too(settings: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(KeyError), recorded(settings, RANK, sock):
        raise KeyError("x")
    assert read(tmp_path / "a" / "member-0.json")["reason"] == "KeyError; its stack is in the log"


@pytest.mark.parametrize("unset", ["registry", "service", "rank", "socket"])
def test_a_service_without_a_name_and_every_follower_write_nothing(
    settings: Settings, tmp_path: Path, unset: str
) -> None:
    fields = {f: getattr(settings, f) for f in settings.__slots__} | (
        {unset: None} if unset in ("registry", "service") else {}
    )
    rank = (
        RankInfo(rank=1, world_size=2, local_rank=1, local_world_size=2, node="n", init="x")
        if unset == "rank"
        else RANK
    )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with recorded(Settings(**fields), rank, None if unset == "socket" else sock) as recorder:
            recorder.loading(1)(1)
            recorder.ready()
        assert list((tmp_path / "a").iterdir()) == []


def test_a_disk_that_is_lost_is_one_line_in_the_log_and_one_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "gone"
    recorder = Recorder(folder / "r.json", Record(name="a", state="ready", heartbeat=0), beat_s=0.005)
    until(lambda: caplog.records, "the warning")
    recorder.ready()
    folder.mkdir()
    until(lambda: len(caplog.records) == 2, "the end of it")
    assert "cannot write" in caplog.messages[0]
    assert "No such file or directory" in caplog.messages[0]
    assert "is written again" in caplog.messages[1]
    recorder.ended("", 0)


def test_a_disk_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "hang")
    monkeypatch.setattr(module, "LAST_WRITE_S", 0.05)
    # opening a pipe that nobody writes to waits for ever, as a lost NFS server does
    monkeypatch.setattr(module, "replace_json", lambda path, value: (tmp_path / "hang").read_text())
    begun = time.monotonic()
    recorder = Recorder(tmp_path / "r.json", Record(name="a", state="ready", heartbeat=0))
    recorder.loading(10)(10)
    recorder.ready()
    recorder.ended("", 0)
    assert time.monotonic() - begun < 2
    with (tmp_path / "hang").open("w"):  # lets the thread go
        pass


def test_a_real_service_that_is_started_by_hand_is_found_in_the_registry(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "services")
    registry.open()
    registry.claim("mine")
    flags = ["--device", "cpu", "--model-parallel", "2", "--registry", str(registry.folder), "--service", "mine"]
    service = Service(tmp_path, *flags)
    try:
        record = until(lambda: (r := registry.records("mine")) and r[0].state == "ready" and r[0], "its word")
        assert (record.url, record.percent, record.job, record.model) == (service.url, 100.0, None, "demo")
        assert record.rate > 0
        service.process.terminate()
        assert service.end(10) == 0
        assert [(r.state, r.exit_code) for r in registry.records("mine")] == [("ended", 0)]
    finally:
        service.kill()
