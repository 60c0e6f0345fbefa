"""The client against scripted replies: answers, streams, and every way in which there is none. Against the real service
it is tested with the doors."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from support.scripted_server import Reply, scripted

from metaseq_api.client import Client
from metaseq_api.errors import (
    EngineStopped,
    MetaseqApiError,
    NotAuthorized,
    Overloaded,
    RequestError,
    SettingsError,
)

SSE = {"Content-Type": "text/event-stream; charset=utf-8"}


def error(message: str, **more: object) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, **more}}).encode()


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_the_question_goes_to_the_completions_path_with_the_key(tail: str) -> None:
    with scripted(Reply(body=b'{"choices": []}')) as server:
        assert Client(server.url + tail, key="secret").complete({"prompt": "ä"}) == {"choices": []}
        ((path, headers, body),) = server.asked
    assert (path, headers["Authorization"], body) == ("/v1/completions", "Bearer secret", {"prompt": "ä"})


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestError), (401, NotAuthorized), (503, EngineStopped), (500, MetaseqApiError), (418, RequestError)],
)
def test_a_refusal_is_the_error_it_was_in_the_server(status: int, kind: type[MetaseqApiError]) -> None:
    reply = Reply(status, error("because", param="n", code="odd"))
    with scripted(reply) as server, pytest.raises(kind, match="because") as caught:
        Client(server.url).complete({})
    assert type(caught.value) is kind
    if isinstance(caught.value, RequestError):
        assert (caught.value.param, caught.value.code) == ("n", "odd")


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    busy = Reply(429, error("later"), {"Retry-After": "3"})
    with scripted(busy, Reply(429, error("later")), Reply()) as server:
        assert Client(server.url, sleep=waits.append).complete({}) == {}
    assert waits == [3, 1]
    waits.clear()
    with scripted(*[busy] * 9) as server:
        with pytest.raises(Overloaded, match="later"):
            Client(server.url, sleep=waits.append).complete({})
        assert len(server.asked) == 6


def test_a_stream_is_its_chunks() -> None:
    chunks = [{"choices": [{"text": "ä"}]}, {"choices": []}]
    body = "".join(f"data: {json.dumps(c)}\r\n\r\n" for c in chunks) + ": a comment\n\ndata: [DONE]\n\n"
    with scripted(Reply(body=body.encode(), headers=SSE)) as server:
        assert list(Client(server.url).stream({"prompt": "x"})) == chunks
        assert server.asked[0][2] == {"prompt": "x", "stream": True}


@pytest.mark.parametrize(
    ("body", "headers", "says"),
    [
        (b'data: {"choices": []}\n\n' + b"data: " + error("it broke") + b"\n\n", SSE, "it broke"),
        (b'data: {"choices": []}\n\n', SSE, "broke its answer off"),
        (b"data: {half", SSE, "no answer from"),
        (b"<html>", {"Content-Type": "text/html"}, "not as this API does"),
    ],
)
def test_a_stream_that_goes_wrong_says_how(body: bytes, headers: dict[str, str], says: str) -> None:
    with scripted(Reply(body=body, headers=headers)) as server, pytest.raises(MetaseqApiError, match=says):
        list(Client(server.url).stream({}))


def test_what_is_no_answer_of_ours_is_told_in_one_line() -> None:
    for reply in (Reply(body=b"[1]"), Reply(404, b"<h1>Not here</h1>"), Reply(502, b"")):
        with scripted(reply) as server, pytest.raises(MetaseqApiError, match="not as this API does"):
            Client(server.url).complete({})


def test_where_nobody_listens_it_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MetaseqApiError, match="Connection refused; is the server running"):
            Client(url).complete({})


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="no address of a server"):
        Client(url)


def test_closing_ends_a_question_that_waits_in_another_thread() -> None:
    found: list[Exception] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"127.0.0.1:{silent.getsockname()[1]}")

        def ask() -> None:
            try:
                client.complete({"prompt": "x"})
            except MetaseqApiError as e:
                found.append(e)

        thread = threading.Thread(target=ask)
        thread.start()
        with silent.accept()[0] as taken:
            taken.recv(1)
            client.close()
            thread.join(10)
    assert not thread.is_alive()
    assert "no answer" in str(found[0])
