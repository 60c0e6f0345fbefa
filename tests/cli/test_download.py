"""metaseq-api-download: all files and the command that serves them, or one line of what is wrong."""

from __future__ import annotations

import hashlib
import importlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import file_server as bad
from support.download_door import FILES, MD5, RELEASE, TOKENIZER
from support.file_server import FileServer, loopback_only, serving
from support.processes import TESTS, clean_env, until

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.download import catalogue
from metaseq_api.download.fetch import Patience

DEMO = Path(__file__).parents[2] / "metaseq_api" / "demo"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    loopback_only(monkeypatch)
    with serving() as server:
        server.files = {f"/opt/{name}": content for name, content in (FILES | TOKENIZER).items()}
        yield server


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The door, with one model more."""
    monkeypatch.setitem(catalogue.RELEASES, "tiny", {"": RELEASE})
    monkeypatch.setattr(catalogue, "TOKENIZER_MD5", MD5)
    module = importlib.import_module("metaseq_api.cli.download")
    monkeypatch.setattr(module.log, "setup", lambda: None)
    return module


def arguments(server: FileServer, folder: Path, *more: str) -> list[str]:
    return ["tiny", str(folder), "--url", f"{server.url}/opt", "--tokenizer-url", f"{server.url}/opt", *more]


def refused(door: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = door.main(list(argv))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("metaseq-api-download: error: ")
    assert err.count("\n") == 1
    return code, err


def test_it_ends_with_the_command_that_serves(
    door: ModuleType, server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "the weights"
    assert door.main(arguments(server, folder)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"metaseq-api-local '{folder}'"
    assert {f"/opt/{p.name}": p.read_bytes() for p in folder.iterdir()} == server.files
    server.asked.clear()
    assert door.main(arguments(server, folder)) == 0
    # lengths alone are asked for, and what has a checksum not even so
    assert {(path, headers["range"]) for path, _, headers in server.asked} == {
        (f"/opt/{name}", "bytes=0-0") for name in FILES
    }


def test_a_pre_signed_address_brings_a_checkpoint_that_opens(
    door: ModuleType, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {p.name: p.read_bytes() for p in DEMO.glob("*.pt")}
    server.files = {f"/175b/{name}": content for name, content in shards.items()} | {
        "/assets/gpt2-vocab.json": (DEMO / "vocab.json").read_bytes(),
        "/assets/gpt2-merges.txt": (DEMO / "merges.txt").read_bytes(),
    }
    tokenizer = {
        path.rpartition("/")[2]: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for path, content in server.files.items()
        if path.startswith("/assets")
    }
    monkeypatch.setattr(catalogue, "TOKENIZER_MD5", tokenizer)
    monkeypatch.setitem(
        catalogue.RELEASES, "demo", {"": catalogue.Release(None, tuple(shards), min(map(len, shards.values())))}
    )
    server.faults = {path: [bad.breaks_off(500_000)] for path in list(server.files)[:2]}
    url = f"{server.url}/175b/stubbed.pt?&Signature=x~y"
    monkeypatch.setattr(door, "Patience", lambda tries: Patience(tries=tries, first_wait_s=0.0))
    assert door.main(["demo", str(tmp_path), "--url", url, "--tokenizer-url", f"{server.url}/assets/"]) == 0
    assert {query for path, query, _ in server.asked if path.startswith("/175b")} == {"&Signature=x~y"}
    assert open_checkpoint(tmp_path).config == open_checkpoint(DEMO).config


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["opt-1.4b", "d"], 2, "no model 'opt-1.4b' is known; did you mean opt-1.3b?"),
        (["opt-175b", "d"], 2, "opt-175b is not public"),
        (["opt-1.3b"], 2, "the following arguments are required: DIR"),
        (["opt-1.3b", "d", "--edition", "2021"], 2, "invalid choice: '2021'"),
        (["opt-1.3b", "d", "--jobs", "0"], 2, "--jobs is 0"),
        (["opt-1.3b", "d", "--timeout", "0"], 2, "--timeout 0"),
        (["opt-1.3b", "d", "--timeout", "nan"], 2, "--timeout nan"),
        (["opt-1.3b", "d", "--tries", "0"], 2, "--tries 0"),
        (["opt-1.3b", "d", "--url", "s3://bucket/x?secret"], 2, "an address is not one of HTTP"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    door: ModuleType,
    server: FileServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, err = refused(door, capsys, *argv)
    assert (found, said in err) == (code, True), err
    assert "secret" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_the_server_has_its_exit_code(
    door: ModuleType, server: FileServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server.files["/opt/tiny-model_part-1.pt"] = b"<html>"
    assert refused(door, capsys, *arguments(server, tmp_path))[0] == 4
    server.always["/opt/tiny-model_part-1.pt"] = bad.answers(403)
    assert refused(door, capsys, *arguments(server, tmp_path))[0] == 3
    assert list(tmp_path.iterdir()) == []  # found before anything is fetched
    server.files |= {f"/opt/{name}": content for name, content in FILES.items()} | {"/opt/gpt2-vocab.json": b"{}"}
    server.always.clear()
    assert refused(door, capsys, *arguments(server, tmp_path))[0] == 7
    assert "gpt2-vocab.json" not in [p.name for p in tmp_path.iterdir()]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_after_an_interruption(
    server: FileServer, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "weights"
    stalled = {f"/opt/{name}": 50_000 * (i + 1) for i, name in enumerate(FILES)}
    server.faults = {path: [bad.stalls(after)] for path, after in stalled.items()}
    argv = [sys.executable, "-m", "support.download_door", *arguments(server, folder)]
    process = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(TESTS)),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def sizes() -> dict[str, int]:
        return {f"/opt/{p.name.removesuffix('.part')}": p.stat().st_size for p in folder.glob("*.pt.part")}

    until(lambda: process.poll() is not None or sizes() == stalled, "all transfers to stall")
    process.send_signal(how)
    out, err = process.communicate(timeout=20)
    assert out == ""
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == (
            "metaseq-api-download: interrupted; run the same command again to go on from here"
        )
        assert "Traceback" not in err
    assert not list(folder.glob("*.pt"))
    again = subprocess.run(
        argv, cwd=tmp_path, env=clean_env(PYTHONPATH=str(TESTS)), capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == f"metaseq-api-local {folder}"
    assert {f"/opt/{p.name}": p.read_bytes() for p in folder.iterdir()} == server.files
    assert {path: server.ranges(path) for path in stalled} == {
        path: [None, f"bytes={after}-"] for path, after in stalled.items()
    }


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, contextlib, importlib\n"
        "door = importlib.import_module('metaseq_api.cli.download')\n"
        "with contextlib.suppress(SystemExit):\n    door.main(['--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "opt-iml-max-175b" in said.stdout
