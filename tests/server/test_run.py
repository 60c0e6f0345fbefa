"""A real server on a real port, met by curl, by openai's client, and by sockets that misbehave."""

from __future__ import annotations

import contextlib
import gc
import json
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from flask import Flask
from support.fake_engine import FakeEngine

from metaseq_api.core import Health
from metaseq_api.errors import Overloaded, PortInUse, SettingsError
from metaseq_api.server import later
from metaseq_api.server.app import MAX_BODY
from metaseq_api.server.port import bind
from metaseq_api.server.run import MAX_HEADER, MOST_AT_ONCE, Server

DEADLINE_S = 20.0
ASK = {"prompt": "hi", "max_tokens": 4}


@pytest.fixture
def api(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=DEADLINE_S) as api:
        yield api


def post(body: Any = ASK, *headers: str, path: str = "/v1/completions") -> bytes:
    """A request as its bytes on the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


@contextlib.contextmanager
def connected(server: Server, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as sock:
        sock.sendall(sent)
        yield sock


def read_answer(sock: socket.socket) -> tuple[int, Any]:
    """Exactly one answer off the wire: status, and body where it is JSON."""
    with sock.makefile("rb", buffering=0) as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        body = b""
        while len(body) < int(headers["content-length"]):
            body += file.read(int(headers["content-length"]) - len(body))
    return status, json.loads(body) if headers["content-type"] == "application/json" else body


def is_well(server: Server) -> bool:
    with connected(server, post()) as sock:
        status, answer = read_answer(sock)
    return status == 200 and bool(answer["choices"][0]["text"] == "abcd")


def is_silent(sock: socket.socket) -> bool:
    """Whether nothing has come for a while."""
    ready, _, _ = select.select([sock], [], [], 0.3)
    return not ready


def hold_health(engine: FakeEngine) -> tuple[threading.Event, threading.Event]:
    """Have who asks how the engine is wait for the first event; the second is set when somebody does."""
    held, entered = threading.Event(), threading.Event()
    healthy = engine.health

    def health() -> Health:
        entered.set()
        assert held.wait(DEADLINE_S)
        return healthy()

    engine.health = health  # type: ignore[method-assign]
    return held, entered


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        threading.Event().wait(0.005)


# openai's client


def test_openais_client_gets_its_completion(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="any", prompt=["hi", "you"], max_tokens=3, n=2, logprobs=1, stop=["z"])
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [
        (0, "abc", "length"),
        (1, "bcd", "length"),
        (2, "abc", "length"),
        (3, "bcd", "length"),
    ]
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "fake")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5 + 12
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [2, 3, 4]


@pytest.mark.parametrize("prompt", ["ab", ["ab", "c"], [101, 102], [[101, 102], [103]]])
def test_openais_client_sends_all_four_forms_of_a_prompt(prompt: Any, api: openai.OpenAI, engine: FakeEngine) -> None:
    api.completions.create(model="any", prompt=prompt, max_tokens=0, echo=True)
    assert engine.requests[-1].prompts in (((101, 102),), ((101, 102), (103,)))


def test_openais_client_lists_the_model(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["fake"]


def test_openais_client_understands_every_kind_of_error(api: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model="any", prompt="hi", max_tokens=1000)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="best_of is 2"):
        api.completions.create(model="any", prompt="hi", stream=True, best_of=2)
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model="any", input="hi")
    with pytest.raises(openai.APIStatusError, match="longer than") as too_large:
        api.completions.create(model="any", prompt="x" * MAX_BODY)
    assert too_large.value.status_code == 413
    engine.fail_with = RuntimeError("broken")
    with pytest.raises(openai.InternalServerError, match="under request id") as broken:
        api.completions.create(model="any", prompt="hi")
    assert broken.value.request_id


# curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(ASK)], 200, '"text": "abcd"'),
        (["/completions", "--json", json.dumps(ASK)], 200, '"text": "abcd"'),
        (["/v1/completions", "-d", json.dumps(ASK)], 415, "curl: -H 'Content-Type: application/json'"),
        (["/generate", "-d", "prefix=hi", "-d", "length=3"], 200, '"result": "success"'),
        (["/generate", "-F", "prefix=hi", "-F", "length=3"], 200, '"text": "abc"'),
        (["/v1/completions"], 405, "method_not_allowed"),
        (["/health"], 200, '"status": "ok"'),
        (["-I", "/"], 200, "text/html; charset=utf-8"),
        (["/v1/completions", "-H", "Transfer-Encoding: chunked", "--json", json.dumps(ASK)], 200, '"text": "abcd"'),
    ],
)
def test_curl_is_answered(arguments: list[str], status: int, says: str, server: Server) -> None:
    arguments = [server.url + a if a.startswith("/") else a for a in arguments]
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", "-w", "\n%{http_code}", *arguments], capture_output=True, text=True, check=True
    )
    answer, _, code = done.stdout.rpartition("\n")
    assert int(code) == status
    assert says in answer


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize("size", [MAX_BODY + 1, 3 * MAX_BODY])
def test_curl_is_told_when_its_body_is_too_large(size: int, server: Server, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(b'{"prompt": "' + b"x" * size + b'"}')
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", "--json", f"@{body}", f"{server.url}/v1/completions"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["error"]["code"] == "payload_too_large"
    assert is_well(server)


# sockets that misbehave


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"BLAH\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "bad_request"),
        (b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400, "bad_request"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "not_implemented"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEADER + b"\r\n\r\n", 431, "headers_too_large"),
        (post(b"{}", f"X-Padding: {'y' * 1000}").replace(b"Length: 2", b"Length: 99999999"), 413, "payload_too_large"),
        (post(b'{"prompt": "\xff"}'), 400, "invalid_json"),
        (post(b"["), 400, "invalid_json"),
        (b"GET /%ff%00/.. HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found"),
        (b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed"),
    ],
)
def test_a_malformed_request_is_refused_in_json_and_the_next_is_served(
    sent: bytes, status: int, code: str, server: Server
) -> None:
    with connected(server, sent) as sock:
        found, answer = read_answer(sock)
    assert (found, answer["error"]["code"]) == (status, code)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert is_well(server)


def test_odd_headers_break_nothing(server: Server) -> None:
    for host in (b"a b\xff<>", b"", b"[::1", b"x:99999", b"xn--\x80", b"..."):
        for other in (
            b"Content-Type: a/\xff;=;=",
            b"Accept: \xff",
            b"Cookie: ;;\xff=",
            b"X-Request-Id: \x80",
            b"Range: x",
        ):
            with connected(server, b"GET /health HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n" % (host, other)) as sock:
                assert read_answer(sock)[0] in (200, 400)
    assert is_well(server)


def test_half_sent_requests_hold_no_thread(server: Server) -> None:
    whole = post()
    with contextlib.ExitStack() as stack:
        for i in range(32):  # four times the server's threads
            stack.enter_context(connected(server, whole[: (i + 1) * len(whole) // 33]))
        assert is_well(server)
    assert is_well(server)


def test_pipelined_requests_are_answered_in_their_order_on_one_connection(server: Server, engine: FakeEngine) -> None:
    sent = b"".join(post({"prompt": "x", "max_tokens": k}) for k in range(1, 6))
    with connected(server, sent) as sock:
        texts = [read_answer(sock)[1]["choices"][0]["text"] for _ in range(5)]
    assert texts == ["a", "ab", "abc", "abcd", "abcde"]


def test_an_error_keeps_the_connection_open_for_the_next_request(server: Server) -> None:
    with connected(server, post({"promt": 1}) + post()) as sock:
        assert read_answer(sock)[0] == 400
        assert read_answer(sock)[0] == 200


def test_a_client_that_goes_away_has_its_request_given_up(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with connected(server, post()):
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        assert not engine.answers[0].cancelled.is_set()
    assert engine.answers[0].cancelled.wait(DEADLINE_S)
    engine.free.set()
    assert is_well(server)
    assert not engine.answers[1].cancelled.is_set()


def test_a_client_that_waits_is_not_mistaken_for_one_that_went(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with connected(server, post()) as stays, connected(server, post()) as goes:
        for _ in range(2):
            assert engine.submitted.acquire(timeout=DEADLINE_S)
        goes.close()
        wait_until(lambda: any(a.cancelled.is_set() for a in engine.answers), "one answer cancelled")
        engine.free.set()
        assert read_answer(stays)[0] == 200
    assert sum(a.cancelled.is_set() for a in engine.answers) == 1


LARGE: dict[str, Any] = {**ASK, "stop": ["never" * 200] * (MOST_AT_ONCE // 1000)}


def test_requests_that_wait_hold_no_thread(app: Flask, engine: FakeEngine) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=1)
    server.start()
    engine.hold()
    with contextlib.ExitStack() as stack:
        kinds = [
            ASK,
            LARGE,
            {**LARGE, "logprobs": 2},
            {**ASK, "logprobs": 2},
            {**ASK, "n": 4, "prompt": ["a", "b"]},
        ] * 3
        waiting = [stack.enter_context(connected(server, post(body))) for body in kinds]
        for _ in waiting:
            assert engine.submitted.acquire(timeout=DEADLINE_S)
        with connected(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
            assert read_answer(sock)[0] == 200
        engine.free.set()
        for sock, body in zip(waiting, kinds, strict=True):
            status, answer = read_answer(sock)
            assert (status, len(answer["choices"])) == (200, 8 if "n" in body else 1)
            assert ("logprobs" in body) == (answer["choices"][0]["logprobs"] is not None)
    server.stop(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_small_request_needs_no_thread(stream: bool, app: Flask, engine: FakeEngine) -> None:
    held, entered = hold_health(engine)
    server = Server(app, bind("127.0.0.1", 0), threads=1)
    server.start()
    with connected(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as hung:
        assert entered.wait(DEADLINE_S)
        with connected(server, post({**ASK, "stream": stream})) as sock:
            assert sock.recv(12) == b"HTTP/1.1 200"
        held.set()
        assert read_answer(hung)[0] == 200
    server.stop(5)


@pytest.mark.parametrize("body", [ASK, LARGE, {**ASK, "stream": True}], ids=["small", "large", "stream"])
def test_one_that_leaves_before_its_answer_is_in_the_log_once(
    body: dict[str, Any], server: Server, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def left() -> list[str]:
        return [r.message for r in caplog.records if " 499 " in r.message]

    engine.hold()
    engine.admits = False
    with caplog.at_level("INFO"):
        with connected(server, post(body)):
            assert engine.submitted.acquire(timeout=DEADLINE_S)
        wait_until(left, "the line in the log")
        assert engine.answers[0].cancelled.is_set()
        engine.free.set()
        assert is_well(server)
    assert len(left()) == 1


def test_one_that_leaves_while_its_large_answer_waits_for_a_thread_is_in_the_log_too(
    app: Flask, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    held, entered = hold_health(engine)
    engine.hold()
    server = Server(app, bind("127.0.0.1", 0), threads=1)
    server.start()
    with caplog.at_level("INFO"), connected(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as hung:
        assert entered.wait(DEADLINE_S)
        with connected(server, post({**ASK, "logprobs": 2})):
            assert engine.submitted.acquire(timeout=DEADLINE_S)
            engine.free.set()
            wait_until(lambda: not server._put_off, "it to be taken up")
        wait_until(lambda: len(server._waitress.active_channels) == 1, "the server to notice")
        held.set()
        wait_until(lambda: any(" 499 " in r.message for r in caplog.records), "the line in the log")
        assert read_answer(hung)[0] == 200
    server.stop(5)
    assert sum(" 499 " in r.message for r in caplog.records) == 1


def test_an_answer_is_free_once_it_was_sent_though_its_connection_goes_on(server: Server, engine: FakeEngine) -> None:
    gc.disable()
    try:
        with connected(server, post()) as sock:
            assert read_answer(sock)[0] == 200
            answer = weakref.ref(engine.answers.pop())
            sock.sendall(post())
            assert read_answer(sock)[0] == 200
            wait_until(lambda: answer() is None, "the first answer to be free")
    finally:
        gc.enable()


def test_a_stream_has_no_head_before_the_engine_has_taken_it(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    engine.admits = False
    with (
        connected(server, post({**ASK, "stream": True})) as taken,
        connected(server, post({**ASK, "stream": True})) as no,
    ):
        for _ in range(2):
            assert engine.submitted.acquire(timeout=DEADLINE_S)
        assert is_silent(taken)
        first, second = engine.answers
        first.admit()
        assert taken.recv(12) == b"HTTP/1.1 200"
        second.end(Overloaded("full", retry_after_s=7.0))
        status, answer = read_answer(no)
        assert (status, answer["error"]["message"]) == (429, "full")


def test_a_stream_begins_where_the_engine_says_nothing(
    server: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later, "ADMIT_S", 0.3)
    engine.hold()
    engine.admits = False
    with connected(server, post({**ASK, "stream": True})) as sock:
        assert sock.recv(12) == b"HTTP/1.1 200"


def test_an_answer_that_comes_too_late_is_given_up_by_the_server_where_the_engine_does_not(
    server: Server, engine: FakeEngine
) -> None:
    engine.hold()
    with connected(server, post({**ASK, "timeout_ms": 20})) as sock:
        status, answer = read_answer(sock)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert engine.answers[0].cancelled.is_set()


def test_health_is_answered_while_requests_wait(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with connected(server, post()):
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        with connected(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
            status, answer = read_answer(sock)
    assert (status, answer["num_running"]) == (200, 1)


# from bind to the end


def test_a_port_is_taken_once_and_the_second_is_told_the_remedy() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} on 127.0.0.1 is taken by another program.*--port"):
            bind("127.0.0.1", port)


def test_nobody_is_let_in_before_the_server_is_made(app: Flask) -> None:
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    server = Server(app, sock, threads=1)
    socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
    server.stop()


def test_a_port_can_be_taken_again_right_after_a_server_that_had_clients(app: Flask, engine: FakeEngine) -> None:
    first = Server(app, bind("127.0.0.1", 0), threads=1)
    first.start()
    with connected(first, post()) as sock:
        read_answer(sock)
        first.stop(0)  # the server hangs up first, so that its side of the connection lingers
        assert sock.recv(1) == b""
    bind("127.0.0.1", first.port).close()


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "a" * 70])
def test_an_address_of_another_machine_is_refused_by_name(host: str) -> None:
    with pytest.raises(SettingsError, match=f"--host {host}"):
        bind(host, 0)


def test_the_url_is_one_that_a_client_here_can_open(app: Flask) -> None:
    for host, wanted in (("0.0.0.0", "http://127.0.0.1:"), ("localhost", "http://127.0.0.1:")):
        server = Server(app, bind(host, 0), threads=1)
        assert server.url == f"{wanted}{server.port}"
        server.stop()


def test_a_server_serves_the_sixth_version_of_the_internet_protocol(app: Flask) -> None:
    try:
        sock = bind("::1", 0)
    except SettingsError:
        pytest.skip("this machine has no IPv6")
    server = Server(app, sock, threads=1)
    server.start()
    assert server.url == f"http://[::1]:{server.port}"
    assert is_well(server)
    server.stop()


def test_a_stopping_server_lets_running_requests_finish_and_takes_no_new_ones(app: Flask, engine: FakeEngine) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    engine.hold()
    with connected(server, post()) as running, connected(server) as idle:
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        stopper = threading.Thread(target=server.stop, args=(DEADLINE_S,))
        stopper.start()
        assert idle.recv(1) == b""  # a connection without a request is closed soon

        def refused() -> bool:
            with contextlib.suppress(ConnectionRefusedError), connected(server):
                return False
            return True

        wait_until(refused, "a new connection refused")
        assert stopper.is_alive()
        engine.free.set()
        status, answer = read_answer(running)
        assert (status, answer["choices"][0]["text"]) == (200, "abcd")
    stopper.join(DEADLINE_S)
    assert not stopper.is_alive()


def test_requests_that_outlast_the_grace_are_given_up_and_told_so(app: Flask, engine: FakeEngine) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    engine.hold()
    with connected(server, post()) as sock:
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        server.stop(0)
        status, answer = read_answer(sock)
    assert (status, answer["error"]["code"]) == (503, "engine_stopped")
    assert engine.answers[0].cancelled.is_set()


def test_a_server_that_never_ran_and_one_stopped_twice_end_quietly(app: Flask) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=1)
    server.stop(0)
    server.stop(0)
    server.run()  # too late: returns at once
    bind("127.0.0.1", server.port).close()


def test_a_stopped_server_leaves_no_thread_and_no_descriptor(app: Flask, engine: FakeEngine) -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    assert is_well(server)
    server.stop(1)

    def back() -> bool:  # or below: threads of tests before may have ended meanwhile
        return all(now <= then for now, then in zip(count(), before, strict=True))

    wait_until(back, f"back to {before} threads and descriptors, not {count()}")


def test_a_signal_handler_may_stop_a_server_that_runs_in_the_main_thread() -> None:
    code = """
import signal, sys
sys.path.insert(0, "tests")
from support.fake_engine import FakeEngine
from metaseq_api.server.app import create_app
from metaseq_api.server.port import bind
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings
server = Server(create_app(FakeEngine(), Settings()), bind("127.0.0.1", 0), threads=2)
signal.signal(signal.SIGTERM, lambda *_: server.stop(5))
print(server.port, flush=True)
server.run()
print("ended")
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as sock:
            sock.sendall(post())
            assert read_answer(sock)[0] == 200
            process.send_signal(signal.SIGTERM)
            assert sock.recv(1) == b""
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, "ended\n")


def test_whoever_the_kernel_let_in_before_the_end_is_answered_and_nobody_is_reset(
    app: Flask, engine: FakeEngine
) -> None:
    """Clients come without a pause while the server ends: each has a whole answer, or was refused."""
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    found: list[str] = []
    enough, over = threading.Event(), threading.Event()

    def come() -> None:
        while not over.is_set():
            try:
                with connected(server, post()) as sock:
                    status, _ = read_answer(sock)
                found.append(str(status))
            except ConnectionRefusedError:
                found.append("refused")
                return
            except OSError as e:
                found.append(repr(e))
            if len(found) > 200:
                enough.set()

    clients = [threading.Thread(target=come) for _ in range(16)]
    for client in clients:
        client.start()
    assert enough.wait(DEADLINE_S)
    server.stop(DEADLINE_S)
    for client in clients:
        client.join(DEADLINE_S)
    over.set()
    assert set(found) <= {"200", "503", "refused"}
    assert found.count("refused") == len(clients)


def test_a_request_that_comes_just_after_the_door_was_shut_is_answered(app: Flask, engine: FakeEngine) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    engine.hold()
    with connected(server, post()) as running, connected(server) as late:
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        stopper = threading.Thread(target=server.stop, args=(DEADLINE_S,))
        stopper.start()
        wait_until(lambda: not server._waitress.accepting, "the door to be shut")
        late.sendall(post())
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        engine.free.set()
        assert read_answer(running)[0] == read_answer(late)[0] == 200
    stopper.join(DEADLINE_S)


def test_while_a_server_hangs_up_it_serves_on_but_keeps_no_connection(server: Server) -> None:
    with connected(server, post()) as sock:
        read_answer(sock)
        server.hang_up()
        sock.sendall(post())
        assert read_answer(sock)[0] == 200
        assert sock.recv(1) == b""
    assert is_well(server)
