"""metaseq-api-complete: the demo model in its own process, and the same of a running server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import clean_env, gone, until
from support.scripted_server import Reply, scripted
from support.service import Service
from support.talk import door, run

GREEDY = ["--max-tokens", "24", "--temperature", "0"]
WANT = " string of the string.\n\nIf the string is specified, the string is returned.\n"
LINES = '"Return the"\n\n{"prompt": "Raise ValueError if", "n": 2, "logprobs": 1}\n{"promt": "x"}\nno JSON\n[1]\n'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    service.kill()


@pytest.fixture(params=["here", "server"])
def source(request: pytest.FixtureRequest, service: Service) -> list[str]:
    """No flag, which is the demo model in the door's process, or the address of a server of it."""
    return [] if request.param == "here" else ["--url", str(service.url)]


@pytest.mark.parametrize("how", ["argument", "standard input", "file", "stream"])
def test_a_prompt_comes_in_three_ways_and_its_text_goes_out(how: str, source: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Return the\n")
    ways = {"argument": ["Return the"], "standard input": [], "file": ["--file", "prompt.txt"], "stream": ["--stream"]}
    ran = run("complete", *ways[how], *GREEDY, *source, cwd=tmp_path, given="Return the\n")
    assert (ran.stdout, ran.stderr, ran.returncode) == (WANT, "", 0)


def test_json_lines_are_answered_in_order_each_by_itself(source: list[str], tmp_path: Path) -> None:
    (tmp_path / "asks.jsonl").write_text(LINES)
    ran = run("complete", "--file", "asks.jsonl", *GREEDY, *source, cwd=tmp_path)
    one, two, *refused = map(json.loads, ran.stdout.splitlines())
    assert [c["text"] + "\n" for c in one["choices"]] == [WANT]
    assert [c["text"] for c in two["choices"]] == [" the exception is raised."] * 2
    tokens = two["choices"][0]["logprobs"]["tokens"]
    assert (len(tokens) - 1, tokens[-1]) == (two["usage"]["completion_tokens"] / 2, "</s>")
    assert [r["error"]["code"] for r in refused] == ["unknown_field", "invalid_json", "invalid_json"]
    assert "prompt" in refused[0]["error"]["message"]
    assert ran.returncode == 1
    assert ran.stderr == "metaseq-api-complete: error: 3 of 5 lines were refused; their answers say why\n"


def test_streamed_json_is_the_apis_chunks(source: list[str], tmp_path: Path) -> None:
    ran = run("complete", "--jsonl", "--stream", *GREEDY, *source, cwd=tmp_path, given=LINES)
    found = list(map(json.loads, ran.stdout.splitlines()))
    chunks = [c for c in found if "choices" in c]
    first = [c for c in chunks if c["id"] == chunks[0]["id"]]
    assert "".join(c["choices"][0]["text"] for c in first) + "\n" == WANT
    assert first[-1]["choices"][0]["finish_reason"] == "stop"
    assert {c["choices"][0]["index"] for c in chunks if c["id"] != chunks[0]["id"]} == {0, 1}
    assert len([c for c in found if "error" in c]) == 3


def test_many_lines_come_back_in_order_as_a_pipe_brings_them(service: Service, tmp_path: Path) -> None:
    """The first is answered before the second is asked: nothing waits for the end of the input."""
    with subprocess.Popen(
        [*door("complete"), "--jsonl", "--url", str(service.url), "--max-tokens", "1", "--temperature", "0"],
        cwd=tmp_path,
        env=clean_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as asking:
        assert asking.stdin
        assert asking.stdout
        asking.stdin.write('{"prompt": "x", "echo": true}\n')
        asking.stdin.flush()
        assert json.loads(asking.stdout.readline())["choices"][0]["text"].startswith("x")
        prompts = [f"number {i}" for i in range(100)]
        out, _ = asking.communicate("".join(json.dumps({"prompt": p, "echo": True}) + "\n" for p in prompts), 60)
    texts = [json.loads(line)["choices"][0]["text"] for line in out.splitlines()]
    assert len(texts) == 100
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["x", "--temperature", "-1"], 1, "temperature"),
        (["x", "--field", "no_such=1"], 1, "no_such"),
        (["x", "--field", "no_such"], 2, "NAME=VALUE"),
        (["x", "--max-tokens", "many"], 2, "--max-tokens"),
        (["x", "--file", "y"], 2, "give one of them"),
        (["--file", "nowhere.txt"], 2, "nowhere.txt"),
        (["x", "--stream", "--n", "2"], 2, "--json"),
        (["x", "--at-once", "0"], 2, "--at-once"),
        (["x", "--checkpoint", "nowhere"], 3, "nowhere"),
        (["x", "--url", "http://127.0.0.1:1"], 1, "Connection refused"),
        (["x", "--url", "http://127.0.0.1:1", "--dtype", "fp32"], 2, "dtype"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    ran = run("complete", *arguments, cwd=tmp_path)
    assert (ran.stdout, ran.returncode) == ("", code), ran.stderr
    assert ran.stderr.startswith("metaseq-api-complete: error: ")
    assert ran.stderr.count("\n") == 1
    assert says in ran.stderr


def test_the_key_comes_from_the_environment(tmp_path: Path) -> None:
    answer = json.dumps({"choices": [{"index": 0, "text": "yes"}]}).encode()
    with scripted(Reply(body=answer)) as server:
        ran = run("complete", "x", "--url", server.url, cwd=tmp_path, METASEQ_API_KEY="secret")
        assert server.asked[0][1]["Authorization"] == "Bearer secret"
    assert (ran.stdout, ran.returncode) == ("yes\n", 0)


def test_a_reader_who_has_seen_enough_is_no_error(service: Service, tmp_path: Path) -> None:
    command = " ".join([*door("complete"), "--jsonl", "--url", str(service.url), "--max-tokens", "1", "--echo"])
    script = f"set -o pipefail; yes '\"Return the\"' | head -2000 | {command} | head -1"
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=60, check=False
    )
    assert json.loads(ran.stdout)["choices"]
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.parametrize("here", [True, False], ids=["here", "server"])
def test_ctrl_c_ends_it_at_once_in_silence_and_gives_the_question_up(
    here: bool, service: Service, tmp_path: Path
) -> None:
    source = ["--model-parallel", "2"] if here else ["--url", str(service.url)]
    with subprocess.Popen(
        [*door("complete"), "--jsonl", "--max-tokens", "400", "--ignore-eos", *source],
        cwd=tmp_path,
        env=clean_env(OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as asking:
        assert asking.stdin
        assert asking.stdout
        asking.stdin.write('{"prompt": "x", "max_tokens": 1}\n' + '"x"\n' * 400)  # and no end of the input
        asking.stdin.flush()
        assert asking.stdout.readline()
        others = psutil.Process(asking.pid).children()
        os.killpg(asking.pid, signal.SIGINT)
        _, err = asking.communicate(timeout=20)
    assert (asking.returncode, err) == (130, "")
    assert len(others) == here
    assert all(gone(p.pid) for p in others)
    until(lambda: not service.running, "the service to be idle")
