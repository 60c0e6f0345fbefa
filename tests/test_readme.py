"""What the README shows is so: its first screen, its resharding loop, its curls against a running service."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.readme import ROOT, blocks, command, first_answer

BIN = Path(sys.executable).parent


def run(line: str, cwd: Path) -> str:
    """Run a command line with this environment's programs first on PATH."""
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(["bash", "-euc", line], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo, as the README's resharding loop leaves it, on a free port."""
    folder = tmp_path_factory.mktemp("readme")
    loop = next(b for b in blocks("sh") if "reshard_fsdp" in b)
    text = run(
        loop.replace("/data/opt", str(folder / "opt")).replace("metaseq_api/demo", str(ROOT / "metaseq_api/demo")),
        folder,
    )
    assert text.count("reshard-model_part-") == 2
    line = [
        str(BIN / "metaseq-api-local"),
        str(folder / "opt"),
        "--port",
        "0",
        "--constants",
        str(ROOT / "constants.py"),
    ]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for said in process.stderr:
            if found := re.search(r"ready on (http://[^/]+)/", said):
                break
        else:
            pytest.fail("the service did not start")
        yield found[1]
        process.terminate()
        assert process.wait(10) == 0


def test_the_first_screen_has_the_two_commands_and_the_answer() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    screen = "\n".join(lines[:45])
    assert "make serve" in screen
    assert "make test" in screen
    assert "finish_reason" in screen
    assert len(lines) < 200


def test_the_first_curl_gives_the_answer_shown(service: str, tmp_path: Path) -> None:
    got = json.loads(run(command("curl").replace("http://127.0.0.1:6010", service), tmp_path))
    want = first_answer()
    for volatile in ("id", "created", "model"):
        assert got.pop(volatile)
        assert want.pop(volatile)
    assert got == want


def test_every_curl_of_the_readme_is_answered(service: str, tmp_path: Path) -> None:
    curls = [line for b in blocks("sh") for line in b.replace("\\\n", " ").splitlines() if line.startswith("curl")]
    assert len(curls) >= 3
    for line in curls:
        answer = run(line.replace("http://127.0.0.1:6010", service), tmp_path)
        if '"stream": true' in line:
            *events, last = [event for event in answer.split("\n\n") if event]
            assert last == "data: [DONE]"
            answer = events[-1].removeprefix("data: ")
        assert "error" not in json.loads(answer), (line, answer)


def test_the_python_of_the_readme_runs(service: str, tmp_path: Path) -> None:
    (block,) = blocks("python")
    text = run(f"python - <<'EOF'\n{block.replace('http://127.0.0.1:6010', service)}\nEOF", tmp_path)
    assert "string" in text


def test_the_programs_of_the_readme_answer(service: str, tmp_path: Path) -> None:
    line = next(n for b in blocks("sh") for n in b.splitlines() if n.startswith("metaseq-api-complete"))
    assert run(line.replace("http://127.0.0.1:6010", service), tmp_path).strip()


def test_the_routes_of_the_table_are_there(service: str) -> None:
    table = (ROOT / "README.md").read_text("utf-8")
    with urllib.request.urlopen(f"{service}/health") as r:
        assert json.load(r)["status"] == "ok"
    with urllib.request.urlopen(service) as r:
        assert "<textarea" in r.read().decode()
    for route in ("/completions", "/v1/completions", "/v1/engines/", "/generate", "/health", "/v1/models"):
        assert route in table


def test_the_tree_names_what_is_there() -> None:
    tree = next(b for b in blocks("text") if "constants.py" in b)
    for name in re.findall(r"^(?:    )?([a-z_./]+)", tree, re.MULTILINE):
        assert (ROOT / name).exists() or (ROOT / "metaseq_api" / name).exists(), name
