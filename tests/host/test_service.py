"""The whole service on the demo checkpoint: any tensor-parallel size, one answer; any end, nothing left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.processes import gone, until
from support.service import DOOR, Service

from metaseq_api.errors import SettingsError
from metaseq_api.launch.front_end import FrontEnd
from metaseq_api.launch.terms import AGAIN_S
from metaseq_api.settings import DEMO, Settings

QUESTION = {"prompt": ["Return the", "Raise ValueError if"], "max_tokens": 24, "temperature": 0}
Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    services: list[Service] = []

    def begin(*arguments: str, **options: object) -> Service:
        services.append(Service(tmp_path, *arguments, **options))  # type: ignore[arg-type]
        return services[-1]

    yield begin
    for s in services:
        s.kill()


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one rank says of the raw shards."""
    service = Service(tmp_path_factory.mktemp("one"))
    texts = service.texts(**QUESTION)
    service.process.terminate()
    assert service.end(10) == 0
    service.kill()
    return texts


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The demo as 2 parts without shards, and as 4."""
    top = tmp_path_factory.mktemp("resharded")
    parts = {2: top / "two", 4: top / "four"}

    def run(module: str, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", f"metaseq_api.scripts.{module}", *arguments], check=True, capture_output=True
        )

    for j in (0, 1):
        files = f"{DEMO}/checkpoint_last-model_part-{j}-shard*.pt"
        run("reshard_fsdp", "--input", files, "--output", f"{parts[2]}/reshard-model_part-{j}.pt")
    pattern = f"{parts[2]}/reshard-model_part-*.pt"
    run(
        "reshard_mp",
        "--input",
        pattern,
        "--output",
        f"{parts[4]}/reshard-model_part-{{i}}.pt",
        "--num-output-parts",
        "4",
    )
    for folder in parts.values():
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(DEMO / name, folder)
    return parts


@pytest.mark.parametrize(("parts", "ranks"), [(0, 2), (0, 4), (2, 1), (4, 2)])
def test_any_files_at_any_tensor_parallel_size_give_one_answer(
    parts: int, ranks: int, want: list[str], resharded: dict[int, Path], start: Start
) -> None:
    folder = [str(resharded[parts])] if parts else []
    service = start(*folder, "--model-parallel", str(ranks))
    assert service.texts(**QUESTION) == want
    assert len(service.ranks) == ranks
    service.process.send_signal(signal.SIGINT)
    assert service.end(5) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_that_are_started_ahead_give_the_same_answer(ranks: int, want: list[str], start: Start) -> None:
    """As on a GPU, every rank being fed what rank 0 drew and has not read yet."""
    service = start("--model-parallel", str(ranks), "--run-ahead")
    assert service.texts(**QUESTION) == want
    assert service.texts(**QUESTION, stop="e", n=2) == service.texts(**QUESTION, stop="e", n=2)
    service.process.send_signal(signal.SIGINT)
    assert service.end(5) == 0


def test_a_service_tells_how_long_it_took_and_where_that_went(start: Start) -> None:
    service = start()
    told = next(m for line in service.lines if (m := re.search(r"ready after ([\d.]+) s: (.*)", line)))
    laps = {name: float(spent) for name, spent in (lap.rsplit(" ", 1) for lap in told[2].split(", "))}
    assert "imports" in laps
    assert sum(laps.values()) <= float(told[1]) + 0.05 * (len(laps) + 1)  # each is rounded
    assert laps["imports"] > laps.get("door", 0)  # what took next to no time is not told


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_every_process_within_five_seconds(signum: int, busy: bool, start: Start) -> None:
    service = start("--model-parallel", "2", *(["--grace", "2"] if signum == signal.SIGTERM else []))
    if busy:
        service.generate_for_ever()
    began = time.monotonic()
    os.killpg(service.process.pid, signum)
    assert service.end(5) == 0
    assert time.monotonic() - began < 5


def test_ctrl_c_ends_it_too_where_a_script_started_it_in_the_background(start: Start) -> None:
    service = start("--model-parallel", "2", door=["bash", "-c", 'trap "" INT; exec "$@"', "sh", *DOOR])
    service.process.send_signal(signal.SIGINT)
    assert service.end(5) == 0


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named(rank: int, busy: bool, start: Start) -> None:
    service = start("--model-parallel", "2")
    if busy:
        service.generate_for_ever()
    service.ranks[rank].kill()
    assert service.end(10) == 20
    last = service.said()[-1]
    assert last.startswith(f"metaseq-api-local: error: rank {rank} of 2"), service.lines
    assert "SIGKILL" in last


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "generating"])
def test_a_killed_front_end_ends_the_job_and_is_named(busy: bool, start: Start) -> None:
    service = start("--model-parallel", "2")
    if busy:
        service.generate_for_ever()
    front = service.front
    front.kill()
    assert service.end(10) == 20
    last = service.said()[-1]
    assert last.startswith("metaseq-api-local: error: the HTTP front end of rank 0"), service.lines
    assert f"(pid {front.pid}) was killed by SIGKILL" in last


def test_the_front_end_says_that_rank_0_is_held(start: Start) -> None:
    service = start()
    assert service.status("/health") == 200
    service.ranks[0].suspend()
    assert service.status("/health") == 503
    assert service.status("/metrics") == 503
    service.ranks[0].resume()
    until(lambda: service.status("/health") == 200, "the service to be well again")
    assert service.complete(prompt=[7], max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_front_end_that_is_held_ends_the_job_and_is_named(start: Start) -> None:
    service = start()
    front = service.front
    front.suspend()
    assert service.end(30) == 20
    assert any(f"(pid {front.pid}) is stopped, by SIGSTOP or a debugger" in line for line in service.said())


def test_a_front_end_that_cannot_begin_says_why(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if %}")
    facts = {"model_name": "demo", "max_seq_len": 512, "vocab_size": 4096}
    with (
        FrontEnd(Settings(chat_template=template), socket.create_server(("127.0.0.1", 0)), facts) as front,
        pytest.raises(SettingsError, match="must be a Jinja2 template"),
    ):
        front.serve()
    assert list(front.line.messages()) == []


def test_no_rank_outlives_a_killed_parent(start: Start) -> None:
    service = start("--model-parallel", "2")
    ranks = [service.front.pid, *(p.pid for p in service.ranks)]
    service.process.kill()
    until(lambda: all(map(gone, ranks)), "the ranks to be gone", 10)


def test_a_request_that_runs_when_the_end_comes_is_answered(start: Start) -> None:
    service = start("--grace", "120")
    asked = {"prompt": [[7, 8]] * 16, "max_tokens": 300, "ignore_eos": True}  # a second and more
    answers: list[dict[str, object]] = []
    client = threading.Thread(target=lambda: answers.append(service.complete(**asked)))
    client.start()
    until(lambda: service.running, "the request to run")
    service.process.terminate()
    assert service.end(60) == 0
    client.join(10)
    assert answers[0]["usage"]["completion_tokens"] == 16 * 300  # type: ignore[index]
    assert any("16 running sequences have" in line for line in service.said()), service.lines


def test_the_end_refuses_new_requests_at_once_and_lets_running_ones_finish_streams_included(start: Start) -> None:
    service = start("--model-parallel", "2")
    ended: list[int] = []
    longest = {"prompt": [[7, 8]] * 16, "max_tokens": 450, "ignore_eos": True}

    def ask() -> None:
        ended.append(service.complete(**longest)["usage"]["completion_tokens"])

    def read_stream() -> None:
        text = service.stream(**longest, stream_options={"include_usage": True})
        assert text.endswith("data: [DONE]\n\n"), text[-200:]
        ended.append(json.loads(text.split("data: ")[-2])["usage"]["completion_tokens"])

    clients = [threading.Thread(target=t) for t in (ask, ask, read_stream)]
    for client in clients:
        client.start()
    until(lambda: service.running == 48, "the requests to run")
    os.killpg(service.process.pid, signal.SIGTERM)  # as SLURM does: every process has it
    until(lambda: service.status("/health") == 503, "the service to say that it is not ready")
    with pytest.raises(urllib.error.HTTPError) as refused:
        service.complete(prompt="x", max_tokens=1)
    assert (refused.value.code, refused.value.headers["Connection"]) == (503, "close")
    assert int(refused.value.headers["Retry-After"]) > 0
    refused.value.close()
    assert service.end(60) == 0
    for client in clients:
        client.join(10)
    assert ended == [16 * 450] * 3
    assert any("48 running sequences have" in line for line in service.said()), service.lines


def test_what_still_runs_when_the_grace_is_over_gets_a_clear_error_also_in_a_stream(start: Start) -> None:
    service = start("--grace", "1")
    told: list[str] = []
    longest = {"prompt": [[7, 8]] * 24, "max_tokens": 480, "ignore_eos": True}

    def ask() -> None:
        try:
            service.complete(**longest)
        except urllib.error.HTTPError as e:
            told.append(f"{e.code} {json.load(e)['error']['code']}")

    def read_stream() -> None:
        last = service.stream(**longest).split("data: ")[-2]
        told.append(f"stream {json.loads(last)['error']['code']}")

    clients = [threading.Thread(target=t) for t in (ask, read_stream)]
    for client in clients:
        client.start()
    until(lambda: service.running == 48, "the requests to run")
    service.process.terminate()
    assert service.end(10) == 0
    for client in clients:
        client.join(10)
    assert sorted(told) == ["503 engine_stopped", "stream engine_stopped"]


def test_a_second_sigterm_shortens_what_the_first_gave(start: Start) -> None:
    service = start("--grace", "600")
    told: list[str] = []

    def ask() -> None:  # for a minute, far longer than the test
        try:
            service.complete(prompt=[[7, 8]] * 512, max_tokens=500, ignore_eos=True)
        except urllib.error.HTTPError as e:
            told.append(f"{e.code} {json.load(e)['error']['code']}")

    client = threading.Thread(target=ask)
    client.start()
    until(lambda: service.running, "the request to run")
    service.process.terminate()
    until(lambda: service.status("/health") == 503, "the end to begin")
    again = time.monotonic() + 1.5 * AGAIN_S
    until(lambda: time.monotonic() > again, "a moment to pass")
    service.process.terminate()
    assert service.end(15) == 0
    client.join(10)
    assert told == ["503 engine_stopped"]


def copy_demo(folder: Path) -> Path:
    shutil.copytree(DEMO, folder / "demo", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return folder / "demo"


def break_missing_shard(demo: Path) -> None:
    (demo / "checkpoint_last-model_part-1-shard0.pt").unlink()


def break_missing_part(demo: Path) -> None:
    for k in (0, 1):
        (demo / f"checkpoint_last-model_part-1-shard{k}.pt").unlink()


def break_truncated(demo: Path) -> None:
    file = demo / "checkpoint_last-model_part-1-shard0.pt"
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)


def break_swapped(demo: Path) -> None:
    a, b = (demo / f"checkpoint_last-model_part-0-shard{k}.pt" for k in (0, 1))
    a.rename(demo / "kept")
    b.rename(a)
    (demo / "kept").rename(b)


def break_copied_part(demo: Path) -> None:
    for k in (0, 1):
        shutil.copy(
            demo / f"checkpoint_last-model_part-0-shard{k}.pt", demo / f"checkpoint_last-model_part-1-shard{k}.pt"
        )


def break_copied_shard(demo: Path) -> None:
    shutil.copy(demo / "checkpoint_last-model_part-0-shard1.pt", demo / "checkpoint_last-model_part-1-shard1.pt")


def break_vocab(demo: Path) -> None:
    vocab = demo / "vocab.json"
    text = vocab.read_text("utf-8").rstrip().removesuffix("}")
    more = ", ".join(f'"extra{i}": {2500 + i}' for i in range(100))
    vocab.write_text(f"{text}, {more}}}", "utf-8")


def break_tokenizer(demo: Path) -> None:
    (demo / "merges.txt").unlink()


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "says"),
    [
        (break_missing_shard, [], 3, "checkpoint_last-model_part-1-shard0.pt"),
        (break_missing_part, [], 3, "checkpoint_last-model_part-1"),
        (break_truncated, [], 4, "checkpoint_last-model_part-1-shard0.pt"),
        (break_swapped, [], 5, "model_part-"),
        (break_copied_part, [], 5, "model_part-1"),
        (break_copied_shard, [], 5, "model_part-1"),
        (break_vocab, [], 7, "vocab.json"),
        (break_tokenizer, [], 7, "merges.txt"),
        (None, ["--model-parallel", "3"], 6, "--model-parallel 3"),
        (None, ["--max-seq-len", "100000"], 2, "(--max-seq-len) is 100000"),
        (None, ["--device", "cuda"], 8, "--device cuda, but torch sees no GPU here"),
        (None, ["--dtype", "fp64"], 2, "--dtype"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_bad_input_is_one_line_and_a_distinct_exit_code(
    damage: Callable[[Path], None] | None, arguments: list[str], code: int, says: str, tmp_path: Path, start: Start
) -> None:
    demo = copy_demo(tmp_path)
    if damage:
        damage(demo)
    service = start(str(demo), *arguments, wait=False)
    assert service.process.wait(60) == code, service.lines
    errors = [line for line in service.said() if "error" in line.lower()]
    assert len(errors) == 1, service.lines
    assert says in errors[0]
    assert not any("Traceback" in line for line in service.lines)


def test_a_port_in_use_is_said_before_anything_is_started(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = start("--port", str(port), wait=False)
        assert service.process.wait(60) == 9
    assert len(service.said()) == 1
    assert f"port {port} " in service.lines[0]


def test_too_little_memory_is_said_before_anything_is_read(tmp_path: Path, start: Start) -> None:
    (tmp_path / "constants.py").write_text(f"CACHE_TOKENS = {10**12}\n")
    service = start(wait=False)
    assert service.process.wait(60) == 10
    assert "GiB" in service.said()[-1]


def test_under_torchrun_each_process_is_a_rank_and_the_answer_is_the_same(want: list[str], start: Start) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    service = start("--device", "cpu", door=[*torchrun, "metaseq_api.cli.interactive_hosted"])
    assert service.texts(**QUESTION) == want
    service.process.terminate()
    service.end(20)
