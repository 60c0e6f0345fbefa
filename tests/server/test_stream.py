"""Server-sent events: what they say, to whom they go, and what becomes of them when somebody leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.fake_engine import FakeAnswer, FakeEngine
from werkzeug.test import EnvironBuilder

from metaseq_api.errors import EngineStopped, MetaseqApiError
from metaseq_api.server.app import COMPLETION_PATHS
from metaseq_api.server.channel import MAX_UNREAD
from metaseq_api.server.port import bind
from metaseq_api.server.run import Server

DEADLINE_S = 20.0
ASK = {"prompt": "hi", "max_tokens": 4, "stream": True}
PROMPTS = st.text('az "\\\n\t\x00\x7f/<', max_size=6)
"""ASCII alone, for which the fake's tokens are letters; the engine's tests have the rest."""


def events(body: bytes) -> list[Any]:
    """What a stream said, as JSON; the end has to be [DONE]."""
    *said, done, nothing = body.decode("ascii").split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in said)
    return [json.loads(event.removeprefix("data: ")) for event in said]


def join(chunks: list[Any]) -> list[Any]:
    """The choices that the chunks of a stream make."""
    choices: dict[int, Any] = {}
    for chunk in chunks:
        for new in chunk["choices"]:
            choice = choices.setdefault(new["index"], {**new, "text": "", "logprobs": None})
            assert new is chunk["choices"][-1]
            assert not choice.get("ended"), "a chunk after the last one"
            choice["text"] += new["text"]
            if new["logprobs"] is not None:
                lists = choice["logprobs"] = choice["logprobs"] or {k: v and [] for k, v in new["logprobs"].items()}
                for name, values in new["logprobs"].items():
                    lists[name] = None if values is None else [*(lists[name] or []), *values]
            choice["finish_reason"] = new["finish_reason"]
            choice["ended"] = new["finish_reason"] is not None
    assert all(c.pop("ended") for c in choices.values())
    return [choices[i] for i in sorted(choices)]


# what is said


@pytest.mark.parametrize("path", COMPLETION_PATHS)
def test_every_completion_path_streams(path: str, client: FlaskClient) -> None:
    answer = client.post(path.replace("<path:engine>", "175b"), json=ASK)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert "Content-Length" not in answer.headers
    chunks = events(answer.data)
    assert join(chunks) == [{"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length"}]
    assert all(set(c) == {"id", "object", "created", "model", "choices"} for c in chunks)
    assert {(c["object"], c["model"]) for c in chunks} == {("text_completion", "fake")}
    assert len({c["id"] for c in chunks}) == 1
    assert chunks[0]["id"].startswith("cmpl-")


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    body=st.fixed_dictionaries(
        {
            "prompt": st.one_of(PROMPTS, st.lists(PROMPTS, min_size=1, max_size=3)),
            "max_tokens": st.integers(1, 9),
            "n": st.integers(1, 3),
            "echo": st.booleans(),
            "logprobs": st.sampled_from([None, 0, 2]),
            "stop": st.sampled_from([None, "c", ["de", "z"]]),
        }
    )
)
def test_a_stream_joined_is_the_answer(body: dict[str, Any], client: FlaskClient, engine: FakeEngine) -> None:
    want = client.post("/v1/completions", json=body)
    if want.status_code != 200:
        assert client.post("/v1/completions", json={**body, "stream": True}).status_code == want.status_code
        return
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post("/v1/completions", json={**body, **options}).data)
    assert join(chunks) == want.json["choices"]
    assert last["choices"] == []
    assert last["usage"] == want.json["usage"]
    assert all(c["usage"] is None for c in chunks)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 1, "best_of": 2}, "best_of"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream_options": {"include_use": True}}, "stream_options"),
        ({"max_tokens": 1000}, "max_tokens"),
    ],
)
def test_what_cannot_be_streamed_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str, client: FlaskClient, engine: FakeEngine
) -> None:
    answer = client.post("/v1/completions", json={**ASK, **fields})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, param)
    assert not engine.requests


def test_a_stream_that_is_not_wanted_is_none(client: FlaskClient) -> None:
    for stream in (False, None):
        answer = client.post("/v1/completions", json={**ASK, "stream": stream, "stream_options": None})
        assert answer.mimetype == "application/json"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (EngineStopped("the engine failed"), "engine_stopped", "the engine failed"),
        (MetaseqApiError("a path: /secret"), "internal_error", "its log has the reason under request id"),
    ],
)
def test_an_error_after_the_head_travels_in_the_stream(
    error: Exception, code: str, says: str, client: FlaskClient, engine: FakeEngine
) -> None:
    engine.fail_with = error
    answer = client.post("/v1/completions", json=ASK)
    assert answer.status_code == 200
    (said,) = events(answer.data)
    assert set(said) == {"error"}
    assert set(said["error"]) == {"message", "type", "param", "code"}
    assert said["error"]["code"] == code
    assert says in said["error"]["message"]
    assert "/secret" not in answer.text


def test_a_stream_has_one_line_in_the_log_when_it_ends(
    client: FlaskClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    client.post("/v1/completions", json={**ASK, "prompt": "secret words"}).data  # noqa: B018
    (line,) = [r.getMessage() for r in caplog.records if r.name == "metaseq_api.server.asker"]
    assert " 200 " in line
    assert "in=12 out=4 streamed reason=length" in line
    assert "secret" not in line


# to whom


@pytest.fixture
def api(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=DEADLINE_S) as api:
        yield api


def test_openais_client_streams(api: openai.OpenAI) -> None:
    stream = api.completions.create(
        model="any",
        prompt=["hi", "you"],
        max_tokens=3,
        n=2,
        logprobs=1,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = [chunk.model_dump() for chunk in stream]
    assert [c["text"] for c in join(chunks)] == ["hiabc", "hibcd", "youabc", "youbcd"]
    assert join(chunks)[0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 5 + 12)


def test_openais_client_streams_without_threads_of_its_own(server: Server) -> None:
    async def ask(n: int) -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=DEADLINE_S) as api:
            text = ""
            async for chunk in await api.completions.create(model="any", prompt="hi", max_tokens=n, stream=True):
                text += chunk.choices[0].text
            return text

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(ask(n) for n in range(1, 20)))

    assert asyncio.run(all_of_them()) == ["abcdefghijklmnopqrs"[:n] for n in range(1, 20)]


def test_openais_client_raises_what_failed_in_a_stream(api: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_with = EngineStopped("the engine failed")
    with pytest.raises(openai.APIError, match="the engine failed") as caught:
        list(api.completions.create(model="any", prompt="hi", stream=True))
    assert caught.value.code == "engine_stopped"
    with pytest.raises(openai.BadRequestError, match="best_of"):
        api.completions.create(model="any", prompt="hi", stream=True, best_of=2)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
def test_curl_sees_a_stream(version: str, server: Server) -> None:
    done = subprocess.run(
        ["curl", "-sSN", "-m", "20", version, "--json", json.dumps(ASK), f"{server.url}/v1/completions"],
        capture_output=True,
        check=True,
    )
    assert join(events(done.stdout))[0]["text"] == "abcd"


# real sockets


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        threading.Event().wait(0.005)


def post(body: Any = ASK) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


@contextlib.contextmanager
def asked(server: Server, engine: FakeEngine, body: Any = ASK, rcvbuf: int = 0) -> Iterator[Any]:
    """A request that waits, from a socket of one's own: (socket, answer)."""
    with socket.socket() as sock:
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        sock.settimeout(DEADLINE_S)
        sock.connect((server.host, server.port))
        sock.sendall(post(body))
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        yield sock, engine.answers[-1]


def read_until(sock: socket.socket, what: bytes) -> bytes:
    got = b""
    while what not in got:
        data = sock.recv(1 << 16)
        assert data, got[-300:]
        got += data
    return got


def read_all(sock: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            got += data
    return got


def body_of(raw: bytes) -> bytes:
    """A chunked body, joined."""
    _, _, rest = raw.partition(b"\r\n\r\n")
    out = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            assert rest == b"\r\n"
            return out
        out, rest = out + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


def is_well(server: Server, engine: FakeEngine) -> bool:
    engine.free.set()
    with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as sock:
        sock.sendall(post())
        return join(events(body_of(read_all(sock))))[0]["text"] == "abcd"


def test_each_part_is_sent_when_it_comes_and_the_head_before_any(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with asked(server, engine) as (sock, answer):
        assert b"text/event-stream" in read_until(sock, b"\r\n\r\n")
        for word in ("one", "two", "\u20ac\n\"'"):
            answer.say(word)
            assert json.dumps(word).encode() in read_until(sock, b"\n\n")
        answer.say_all()
        assert read_all(sock).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert is_well(server, engine)


def test_what_piled_up_is_one_chunk_for_each_choice(server: Server, engine: FakeEngine) -> None:
    with asked(server, engine, {**ASK, "n": 2, "max_tokens": 26}) as (sock, _):
        chunks = events(body_of(read_all(sock)))
    assert [c["choices"][0]["index"] for c in chunks] == [0, 1]
    assert join(chunks)[0]["text"] == "abcdefghijklmnopqrstuvwxyz"


def test_streams_hold_no_thread(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(asked(server, engine)) for _ in range(32)]  # four times the server's threads
        before = threading.active_count()
        for i, (_, answer) in enumerate(streams):
            answer.say(f"<{i}>")
        for i, (sock, _) in enumerate(streams):
            assert f"<{i}>".encode() in read_until(sock, b">")
        assert is_well(server, engine)
        assert threading.active_count() == before


def leave_at_once(sock: socket.socket) -> None:
    """Reset the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


LEAVE = {"close": socket.socket.close, "reset": leave_at_once, "half-close": lambda s: s.shutdown(socket.SHUT_WR)}


@pytest.mark.parametrize("how", LEAVE)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_has_its_request_given_up_at_once(
    how: str, stream: bool, begun: bool, server: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaseq_api.server.run.POLL_S", 3600)  # nobody looks: it has to be told
    engine.hold()
    with asked(server, engine, {**ASK, "stream": stream}) as (sock, answer):
        if stream and begun:
            answer.say("x")
            read_until(sock, b'"x"')
        LEAVE[how](sock)
        assert answer.cancelled.wait(DEADLINE_S)
    engine.free.set()
    assert is_well(server, engine)


def test_a_stream_that_breaks_costs_its_connection_alone(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with asked(server, engine) as (sock, answer), asked(server, engine) as (other, kept):
        answer.end(RuntimeError("broken"))
        assert not read_all(sock).endswith(b"\r\n0\r\n\r\n")
        kept.say("still here")
        read_until(other, b"still here")
    assert answer.cancelled.is_set()
    assert is_well(server, engine)


def test_only_the_one_that_left_is_given_up(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with asked(server, engine) as (stays, kept), asked(server, engine) as (goes, left):
        goes.close()
        assert left.cancelled.wait(DEADLINE_S)
        left.say("nobody hears this")
        kept.say("still here")
        read_until(stays, b"still here")
        assert not kept.cancelled.is_set()


def test_a_client_that_does_not_read_is_ended_with_an_error_and_others_go_on(
    server: Server, engine: FakeEngine
) -> None:
    engine.hold()
    with asked(server, engine, rcvbuf=4096) as (sleeps, slow), asked(server, engine) as (reads, quick):
        said = 0
        while not slow.cancelled.is_set():
            slow.say("z" * 65536)
            said += 1
            quick.say(f"<{said}>")
            read_until(reads, f"<{said}>".encode())
            assert said < 1000, "what is not read has no bound"
        (channel,) = [c for c in server._waitress.active_channels.values() if c.total_outbufs_len]
        assert channel.total_outbufs_len < 2 * MAX_UNREAD
        assert said * 65536 > MAX_UNREAD
        *_, error = events(body_of(read_all(sleeps)))
        assert error["error"]["code"] == "slow_reader"
        assert "not read" in error["error"]["message"]


def test_one_part_larger_than_the_bound_does_not_make_its_reader_slow(server: Server, engine: FakeEngine) -> None:
    engine.hold()
    with asked(server, engine, rcvbuf=4096) as (sock, answer):
        answer.say("z" * (12 * MAX_UNREAD))
        channel = next(iter(server._waitress.active_channels.values()))
        wait_until(lambda: channel.total_outbufs_len > MAX_UNREAD, "more than the bound to wait for the reader")
        answer.say("y")
        answer.say_all()
        chunks = events(body_of(read_all(sock)))
    assert join(chunks)[0]["text"] == "z" * (12 * MAX_UNREAD) + "yabcd"


def test_streams_that_outlast_the_grace_are_told_and_ended(app: Flask, engine: FakeEngine) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    engine.hold()
    with asked(server, engine) as (sock, answer), asked(server, engine) as (_, _):
        answer.say("half")
        read_until(sock, b"half")
        server.stop(0)
        assert events(body_of(b"\r\n\r\n" + read_all(sock)))[-1]["error"]["code"] == "engine_stopped"
    assert all(a.cancelled.is_set() for a in engine.answers)
    answer.say("to nobody")  # the engine may outlive the server


def test_a_stream_within_the_grace_is_finished(app: Flask, engine: FakeEngine) -> None:
    server = Server(app, bind("127.0.0.1", 0), threads=4)
    server.start()
    engine.hold()
    with asked(server, engine) as (sock, answer):
        read_until(sock, b"\r\n\r\n")
        stopper = threading.Thread(target=server.stop, args=(DEADLINE_S,))
        stopper.start()
        answer.say("on ")
        read_until(sock, b"on ")
        answer.say_all()
        assert read_all(sock).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        stopper.join(DEADLINE_S)
        assert not stopper.is_alive()


def test_a_stream_ends_with_its_server_also_under_another_one_than_ours(app: Flask, engine: FakeEngine) -> None:
    from metaseq_api.server.app import CLOSING

    engine.hold()
    environ = EnvironBuilder("/v1/completions", method="POST", json=ASK).get_environ()
    body: Any = app.wsgi_app(environ, lambda *_: lambda _: None)
    app.extensions[CLOSING].set()
    assert events(b"".join(body))[-1]["error"]["code"] == "engine_stopped"
    assert engine.answers[0].cancelled.is_set()


def test_a_reader_of_the_plain_stream_that_stops_has_it_given_up(app: Flask, engine: FakeEngine) -> None:
    engine.hold()
    environ = EnvironBuilder("/v1/completions", method="POST", json=ASK).get_environ()
    body: Any = app.wsgi_app(environ, lambda *_: lambda _: None)
    running: FakeAnswer = engine.answers[0]
    running.say("x")
    assert b'"x"' in next(iter(body))
    body.close()
    assert running.cancelled.is_set()
