"""metaseq-api-keys shows a key once and keeps its hash; metaseq-api-local asks for keys where others reach it."""

from __future__ import annotations

import importlib
import json
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from metaseq_api.cli.keys import main
from support.processes import TESTS, clean_env, until

from metaseq_api.server.key_file import read_keys, read_secret
from metaseq_api.server.keys import Keyring


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METASEQ_API_CONSTANTS", raising=False)
    monkeypatch.setattr(importlib.import_module("metaseq_api.cli.keys").log, "setup", lambda: None)
    return tmp_path


def keys(*argv: str) -> int:
    return main(["--keys", "k.jsonl", *argv])


def test_a_key_that_was_added_lets_in_until_it_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--weight", "10", "--rate", "60", "--tokens", "9000", "--concurrency", "4", "--expires", "2100-01-31"]
    assert keys("add", "alice", *limits) == 0
    secret = capsys.readouterr().out.strip()
    found = Keyring(Path("k.jsonl")).find(secret)
    assert found is not None
    assert (found.name, found.weight, found.concurrency) == ("alice", 10.0, 4)
    assert (found.requests_per_minute, found.tokens_per_minute) == (60, 9000)
    assert keys("list") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split() == ["alice", "10", "60", "9000", "4", "2100-01-31T00:00:00+00:00"]
    assert secret not in shown
    assert keys("remove", "alice") == 0
    assert Keyring(Path("k.jsonl")).find(secret) is None


def test_a_key_can_go_to_a_file_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("add", "alice", "--out", "alice.key") == 0
    assert capsys.readouterr().out == ""
    assert stat.S_IMODE(Path("alice.key").stat().st_mode) == 0o600
    assert Keyring(Path("k.jsonl")).find(read_secret(Path("alice.key"))) is not None
    assert keys("add", "bob", "--out", "alice.key") == 2
    assert [k.name for k in read_keys(Path("k.jsonl"))[0]] == ["alice"]


def test_the_file_of_constants_is_the_default(here: Path) -> None:
    assert main(["list"]) == 2
    (here / "constants.py").write_text(f"KEYS_FILE = {str(here / 'mine.jsonl')!r}\n")
    assert main(["add", "alice"]) == 0
    assert [k.name for k in read_keys(here / "mine.jsonl")[0]] == ["alice"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["add", "alice"], "has a key named alice already"),
        (["remove", "bob"], "no key named bob"),
        (["add", "a b"], "a name is 1 to 64 letters"),
        (["add", "bob", "--weight", "0"], "weight is 0.0"),
        (["add", "bob", "--rate", "0"], "--rate: '0' is not a number from 1 on"),
        (["--keys", "nowhere", "list"], "make it with metaseq-api-keys --keys nowhere add NAME"),
        (["add", "bob", "--expires", "2020-01-31"], "--expires 2020-01-31 is over already"),
        (["add", "bob", "--expires", "soon"], "--expires: expires must be a date"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("add", "alice") == 0
    capsys.readouterr()
    before = Path("k.jsonl").read_text()
    assert keys(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert Path("k.jsonl").read_text() == before


# the service's door


class Served:
    """metaseq-api-local with a dummy rank, ended again: what the rank was told, and what was said."""

    def __init__(self, here: Path, *argv: str, **env: str) -> None:
        self.here = here
        here.joinpath("rank0.json").unlink(missing_ok=True)
        self.line = [sys.executable, "-m", "support.door", "--port", "0", *argv]
        environ = clean_env(DUMMY_DIR=str(here), PYTHONPATH=str(TESTS), **env)
        with subprocess.Popen(self.line, cwd=here, env=environ, stderr=subprocess.PIPE, text=True) as service:
            until(lambda: here.joinpath("rank0.json").exists() or service.poll() is not None, "the dummy rank")
            self.processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
            service.send_signal(signal.SIGTERM)
            _, self.err = service.communicate(timeout=30)
        self.code = service.returncode

    @property
    def told(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self.here.joinpath("rank0.json").read_text())["settings"]
        return settings


def test_a_service_that_others_reach_makes_a_key_and_tells_it_once_and_no_process_list_shows_it(here: Path) -> None:
    service = Served(here, "--host", "0.0.0.0")
    secret = service.told["api_key"]
    assert secret.startswith("msk-")
    assert service.err.count(secret) == 1
    assert "support.door" in service.processes
    assert secret not in service.processes


def test_one_for_this_machine_alone_or_told_so_makes_none(here: Path) -> None:
    for argv in ([], ["--host", "0.0.0.0", "--no-keys"]):
        service = Served(here, *argv)
        assert service.told["api_key"] is None
        assert "msk-" not in service.err
        assert ("anybody who reaches" in service.err) == bool(argv)


def test_the_key_of_the_environment_is_taken_and_not_shown(here: Path) -> None:
    service = Served(here, "--host", "0.0.0.0", METASEQ_API_KEY="my-own-key-0123456789")
    assert service.told["api_key"] == "my-own-key-0123456789"
    assert "my-own-key" not in service.err


def test_the_file_of_one_key_is_made_for_this_user_alone(here: Path) -> None:
    service = Served(here, "--host", "0.0.0.0", "--api-key-file", "service.key")
    assert (service.told["api_key"], service.told["api_key_file"]) == (None, "service.key")
    assert "a new API key is in service.key" in service.err
    assert "msk-" not in service.err
    assert (here / "service.key").stat().st_mode & 0o077 == 0


def test_keys_that_cannot_be_used_are_refused_before_anything_starts(here: Path) -> None:
    (here / "bad.jsonl").write_text("msk-plain-text\n")
    for argv, says in ((["--keys", "nowhere"], "cannot be read"), (["--keys", "bad.jsonl"], "line 1 is not a key")):
        service = Served(here, *argv)
        assert service.code == 2
        assert says in service.err
        assert "plain-text" not in service.err
        assert not (here / "rank0.json").exists()
