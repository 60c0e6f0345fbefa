"""The front end's own loop, without its process: real sockets at both ends, a test in rank 0's place."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.processes import DEADLINE_S

from metaseq_api.core.line import Line
from metaseq_api.front import Front
from metaseq_api.server.app import create_app
from metaseq_api.server.port import bind
from metaseq_api.server.remote import Facts, RemoteEngine
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings

BODY = json.dumps({"prompt": "hi", "max_tokens": 4, "stream": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ASK = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.mark.parametrize("last", [None, ["what", "is", "this"]])
def test_who_waits_is_told_when_rank_0_has_gone_or_says_what_nobody_knows(
    last: list[Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = map(Line, socket.socketpair())
    front = Front.__new__(Front)  # what its process makes of files and descriptors
    front._line, front._stopped = here, False
    front.engine = RemoteEngine(here, Facts(model_name="m", max_seq_len=99, vocab_size=300), FakeEngine())
    front._server = Server(create_app(front.engine, Settings()), bind("127.0.0.1", 0), threads=4)
    running = threading.Thread(target=front.run)
    running.start()
    there.send("hang_up")  # anything: then it attends
    said = there.messages()
    with socket.create_connection((front._server.host, front._server.port), DEADLINE_S) as sock:
        sock.sendall(ASK)
        what, number, _ = next(said)
        assert what == "submit"
        there.send("told", [[number, []]])
        there.send("words", [number], ["first"])
        got = b""
        while b"first" not in got:
            got += sock.recv(1 << 16)
        if last is None:
            there.hang_up()
        else:
            there.send(*last)
        while data := sock.recv(1 << 16):
            got += data
    running.join(DEADLINE_S)
    assert not running.is_alive()
    assert b'"code": "engine_stopped"' in got
    assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert ("could not be handled" in caplog.text) == (last is not None)
    assert list(said) == []
    here._sock.close()
