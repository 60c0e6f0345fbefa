"""Streams are watched event by event, and what is made of their times is right."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from metaseq_api.cli import bench
from support.processes import children, clean_env, command, gone, until

from metaseq_api.bench import serve, startup
from metaseq_api.bench.clients import request
from metaseq_api.bench.watching import Answer, watched
from metaseq_api.errors import ServiceError
from metaseq_api.kernels.native import native
from metaseq_api.settings import DEMO

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "a"}], "usage": null}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_events_are_counted_however_the_bytes_are_cut() -> None:
    whole = HEAD + 3 * EVENT + USAGE + DONE
    for size in (1, 7, 64, len(whole)):
        answer = Answer(due=0.0)
        for i, at in enumerate(range(0, len(whole), size)):
            answer.feed(whole[at : at + size], float(i))
        answer.end()
        assert (answer.error, answer.num_tokens, len(answer.events)) == ("", 3, 3)
        assert answer.events == sorted(answer.events)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", "HTTP/1.1 429 Too Many Requests"),
        (HEAD + EVENT, "the stream broke off"),
        (HEAD + b'data: {"error": {}}\n\n' + DONE, "the stream ended without its usage"),
        (HEAD + USAGE + DONE, "the stream held no text"),
        (b"", "the stream broke off"),
    ],
)
def test_a_stream_that_failed_says_how(said: bytes, error: str) -> None:
    answer = Answer(due=0.0)
    if said:
        answer.feed(said, 1.0)
    answer.end()
    assert answer.error == error


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_bench_and_all_that_it_started_in_one_line(signum: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "metaseq_api.cli.bench", "serve", "--checkpoint", str(DEMO), "--requests", "1000"],
        cwd=tmp_path,
        env=clean_env(OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: any("clients import child" in str(command(p)) for p in children(process.pid)), "the clients", 60)
        started = children(process.pid)
        process.send_signal(signum)
        assert process.wait(30) == 130
        assert process.stderr
        assert process.stderr.read().splitlines() == ["metaseq-api-bench: interrupted"]
    until(lambda: all(gone(p.pid) for p in started), "all to be gone", 5)


@pytest.fixture
def server() -> Iterator[tuple[int, list[int]]]:
    """Answers each connection in a thread; its port, and how many were open each time one came."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_now, seen, lock = set[int](), list[int](), threading.Lock()

    def answer(sock: socket.socket) -> None:
        with sock:
            sock.recv(1 << 16)
            with lock:
                open_now.add(id(sock))
                seen.append(len(open_now))
            for part in (HEAD, EVENT, EVENT + EVENT[:9], EVENT[9:] + USAGE + DONE):
                sock.sendall(part)
                threading.Event().wait(0.01)
            with lock:
                open_now.discard(id(sock))

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1], seen
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_no_more_streams_are_open_than_was_asked_for(server: tuple[int, list[int]]) -> None:
    port, seen = server
    answers = watched("127.0.0.1", port, [request({})] * 9, at=None, concurrency=3)
    assert [a["error"] for a in answers] == [""] * 9
    assert {(a["num_tokens"], len(a["events"])) for a in answers} == {(3, 3)}
    assert max(seen) <= 3
    assert all(a["due"] < a["events"][0] <= a["events"][-1] for a in answers)


def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        answers = watched("127.0.0.1", taken.getsockname()[1], [request({})] * 3, at=[0.0, 0.01, 0.02], concurrency=1)
    assert [a["error"].partition(": ")[2] for a in answers] == ["Connection refused"] * 3


def test_a_request_counts_from_when_it_was_due(server: tuple[int, list[int]]) -> None:
    port, _ = server
    answers = watched("127.0.0.1", port, [request({})] * 3, at=[0.0, 0.05, 0.06], concurrency=3)
    assert [a["due"] for a in answers] == [0.0, 0.05, 0.06]
    assert all(a["events"][0] >= a["due"] for a in answers)


def test_requests_come_at_random_at_the_rate_that_was_asked_and_again_the_same() -> None:
    at = serve.arrivals(5.0, 2000, seed=1)
    assert at == serve.arrivals(5.0, 2000, seed=1)
    assert at != serve.arrivals(5.0, 2000, seed=2)
    assert at[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.1)
    short = sum(gap < 0.1 for gap in gaps) / len(gaps)
    assert short == pytest.approx(0.39, abs=0.04)  # 1 - exp(-1/2): memoryless, not even


def test_what_is_made_of_the_answers_is_right() -> None:
    def answer(due: float, *events: float, num: int) -> dict[str, object]:
        return {"due": due, "events": list(events), "num_tokens": num, "error": ""}

    failed = {"due": 0.0, "events": [], "num_tokens": 0, "error": "HTTP/1.1 429 Busy"}
    said = {
        "answers": [answer(0.0, 0.5, 0.6, 0.7, num=3), answer(1.0, 3.0, 3.5, 4.0, num=5), failed],
        "cpu": 0.4,
    }
    level = serve.summary("2 at once", said, serve.Load(ttft_ms=1000, tpot_ms=200))
    assert level.times["ttft"] == pytest.approx([500, 2000, 2000])
    assert level.times["tpot"] == pytest.approx([100, 250, 250])
    assert level.times["itl"] == pytest.approx([100, 500, 500])
    assert level.times["e2e"] == pytest.approx([700, 3000, 3000])
    assert (level.num_requests, level.num_failed, level.why_failed) == (3, 1, "HTTP/1.1 429 Busy")
    assert level.output_rate == pytest.approx(8 / 4)
    assert level.request_rate == pytest.approx(2 / 4)
    assert (level.good, level.goodput) == pytest.approx((1 / 3, 1 / 4))
    assert level.tokens_per_event == pytest.approx(8 / 6)
    assert level.client_cpu == pytest.approx(0.1)
    head, line = serve.cells([level], serve.Load())
    assert len(head) == len(line)
    assert line[0] == "2 at once, 1 of 3 failed"
    assert serve.points([level]) == [pytest.approx((0.1, 2))]


def test_where_nothing_is_answered_the_reason_is_the_error() -> None:
    answers = [{"due": 0.0, "events": [], "num_tokens": 0, "error": "HTTP/1.1 401 Unauthorized"}]
    with pytest.raises(ServiceError, match="401 Unauthorized"):
        serve.measure(lambda order: {"answers": answers, "cpu": 0.0}, serve.Load(concurrency=(1,)), print, lambda: None)


def test_what_a_service_tells_of_its_start_is_understood() -> None:
    said = ["x", "12:00:00 I rank0 metaseq_api.host: ready after 4.1 s: door 0.2, imports 1.9, other ranks 0.5"]
    start = startup.read(said, 4.5)
    assert (start.ready, start.first_token) == (4.1, 4.5)
    assert start.laps == {"door": 0.2, "imports": 1.9, "other ranks": 0.5}
    lines = startup.cells([start, startup.Start(ready=3, first_token=3.1, laps={"imports": 2.0})])
    assert lines[-2:] == [["- imports", "1.9", "2.0"], ["- other ranks", "0.5", ""]]
    with pytest.raises(ServiceError):
        startup.read(["nothing"], 1.0)


@pytest.mark.slow
def test_a_service_is_started_swept_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn.svg"
    few = ["--shortest", "4", "--longest", "8", "--new-tokens", "4", "--requests", "4", "--threads", "1"]
    sweep = ["--concurrency", "1", "2", "--json", str(kept), "--plot", str(drawn)]
    demo = str(Path(bench.__file__).parents[1] / "metaseq_api/demo")
    assert bench.main(["serve", "--checkpoint", demo, *few, *sweep]) == 0
    assert "2 at once" in capsys.readouterr().out
    levels = json.loads(kept.read_text())["figures"]["levels"]
    assert [level["num_failed"] for level in levels] == [0, 0]
    assert "roofline" in drawn.read_text()


@pytest.mark.slow
def test_the_front_end_is_measured_beside_the_engine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--rounds", "1", "--streams", "4", "--new-tokens", "4", "--connections", "2", "--requests", "3"]
    assert bench.main(["http", *few, "--threads", str(torch.get_num_threads())]) == 0
    shown = capsys.readouterr().out
    assert "one request at a time: added, p50" in shown
    assert "4 streams: of the engine's" in shown


@pytest.mark.slow
def test_random_weights_are_served_as_a_checkpoint_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--starts", "2", "--threads", "1", "--json", str(tmp_path / "kept.json")]
    assert bench.main(["startup", "--shape", "opt-125m", "--dtype", "fp32", *twice]) == 0
    shown = capsys.readouterr().out
    assert "from the command to the first token" in shown
    assert "- imports" in shown
    if native() is not None:  # what the first start compiled, the second finds
        first, second = (start["laps"] for start in json.loads((tmp_path / "kept.json").read_text())["figures"])
        assert first["compiling"] > 2 * second.get("compiling", 0)
