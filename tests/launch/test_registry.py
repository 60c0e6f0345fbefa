"""The registry: atomic files, one owner for a name, newer versions' fields, and no key where others see it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from metaseq_api.errors import ServiceError, SettingsError
from metaseq_api.launch.registry import CLAIM_S, Record, Registry, Submission, read_key, replace_json, write_private


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "services")
    registry.open()
    return registry


SUBMISSION = Submission(name="a", job="17", model="/data/opt", submitted=1.0, key_file="/x/key", log="/x/log")


def test_what_is_written_is_read_again(registry: Registry) -> None:
    registry.claim("a")
    registry.write_submission(SUBMISSION)
    record = Record(name="a", state="ready", heartbeat=2.0, port=6010, job="17", exit_code=None)
    replace_json(registry.member_file("a", 0), {f: getattr(record, f) for f in record.__slots__})
    assert registry.submission("a") == SUBMISSION
    assert registry.records("a") == [record]
    assert registry.names() == ["a"]


def test_fields_that_a_newer_version_added_are_left_and_missing_ones_take_their_default(registry: Registry) -> None:
    registry.claim("a")
    new = {"name": "a", "state": "warming", "heartbeat": 5, "format": 9, "replica_of": {"x": 1}}
    replace_json(registry.member_file("a", 0), new)
    assert registry.records("a") == [Record(name="a", state="warming", heartbeat=5, format=9)]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"name": "a"}', '{"name": "a", "state": 3, "heartbeat": 1}'])
def test_a_file_that_is_not_a_record_counts_as_none(registry: Registry, text: str) -> None:
    registry.claim("a")
    registry.member_file("a", 0).write_text(text)
    assert registry.records("a") == []


def test_several_members_are_read_in_order(registry: Registry) -> None:
    registry.claim("a")
    for member in (10, 2):
        replace_json(
            registry.member_file("a", member), {"name": "a", "state": "ready", "heartbeat": 1, "member": member}
        )
    assert [r.member for r in registry.records("a")] == [2, 10]


def test_everything_is_for_its_user_alone(registry: Registry) -> None:
    registry.claim("a")
    registry.write_submission(SUBMISSION)
    write_private(registry.key_file("a"), "secret\n")
    assert oct(registry.folder.stat().st_mode & 0o777) == "0o700"
    assert oct(registry.path("a").stat().st_mode & 0o777) == "0o700"
    for file in registry.path("a").iterdir():
        assert oct(file.stat().st_mode & 0o777) == "0o600"


def test_a_folder_that_others_may_write_is_refused(registry: Registry) -> None:
    registry.folder.chmod(0o770)
    with pytest.raises(SettingsError, match=r"others may write in the registry .*; chmod 700 it"):
        registry.open()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot be made \(Not a directory\); name a folder"):
        Registry(tmp_path / "file" / "x").open()


@pytest.mark.parametrize("name", ["", ".a", "a/b", "../a", "logs", "-a", "a b", "a" * 64, "a\n"])
def test_a_name_that_cannot_be_one_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be a service's name"):
        registry.path(name)


def test_of_many_who_claim_a_name_at_once_one_has_it(registry: Registry) -> None:
    got, refused, start = [], [], threading.Barrier(16)

    def claim() -> None:
        start.wait()
        try:
            got.append(registry.claim("a"))
        except ServiceError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (len(got), len(refused)) == (1, 15)
    assert "there is a service a already" in refused[0]


def test_a_claim_counts_for_a_while_and_then_is_taken_for_left_behind(registry: Registry) -> None:
    path = registry.claim("a")
    now = time.time()
    assert registry.is_claimed("a", now)
    assert not registry.is_claimed("b", now)
    os.utime(path, (now - CLAIM_S - 1,) * 2)
    assert not registry.is_claimed("a", now)
    registry.write_submission(SUBMISSION)
    assert not registry.is_claimed("a", time.time())


def test_forgetting_leaves_the_log_and_frees_the_name(registry: Registry) -> None:
    registry.claim("a")
    registry.write_submission(SUBMISSION)
    log = registry.log_file("a", "17")
    log.write_text("x")
    registry.forget("a")
    registry.forget("a")
    assert [p.name for p in registry.folder.iterdir()] == ["logs"]
    assert log.exists()
    registry.claim("a")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    replace_json(path, {"n": 0})
    begun, done = threading.Event(), threading.Event()

    def write() -> None:
        begun.wait(30)
        for n in range(300):
            replace_json(path, {"n": n, "filler": "x" * 5000})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        assert json.loads(path.read_text())["n"] >= seen
        seen = json.loads(path.read_text())["n"]
        begun.set()
    writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ["", "short", "two words here", "zwölf-zeichen"])
def test_a_key_that_http_cannot_carry_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(SettingsError, match="holds no usable key") as e:
        read_key(tmp_path / "key")
    assert not text or text not in str(e.value)
