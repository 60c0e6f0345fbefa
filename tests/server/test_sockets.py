"""Which sockets have something: who is waited for, who no more, and what becomes of one that fails. Real sockets."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from support.fake_engine import FakeEngine
from support.processes import DEADLINE_S, until
from waitress import wasyncore

from metaseq_api.server.port import bind
from metaseq_api.server.run import Server
from metaseq_api.server.sockets import Sockets

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class One:
    """A dispatcher that waits for what a test says."""

    accepting = False

    def __init__(self, sock: socket.socket) -> None:
        self._fileno: int | None = sock.fileno()
        self.reads, self.writes = True, False

    def readable(self) -> bool:
        return self.reads

    def writable(self) -> bool:
        return self.writes


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def waited_for(one: One) -> Sockets:
    assert one._fileno is not None
    sockets = Sockets({one._fileno: one})
    sockets.look_at(one)
    return sockets


def test_one_is_waited_for_as_it_said_when_it_was_looked_at(pair: tuple[socket.socket, socket.socket]) -> None:
    one = One(pair[0])
    sockets = waited_for(one)
    assert sockets.wait(0) == []
    pair[1].send(b"x")
    assert sockets.wait(0) == [(one, IN)]
    one.reads, one.writes = False, True
    assert sockets.wait(0) == [(one, IN)], "nobody looked"
    sockets.look_at(one)
    assert sockets.wait(0) == [(one, OUT)]
    one.writes = False
    sockets.look_at(one)
    assert sockets.wait(0) == []
    pair[1].close()
    assert [who for who, flags in sockets.wait(0) if flags & select.EPOLLHUP] == [one], "its end is told in any case"
    sockets.close()


def test_one_that_is_forgotten_is_waited_for_no_more_though_another_holds_its_socket(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    one, held = One(pair[0]), pair[0].dup()
    sockets = waited_for(one)
    pair[1].send(b"x")
    sockets.forget(one)
    sockets.forget(one)
    pair[0].close()
    assert sockets.wait(0) == []
    one._fileno = None
    sockets.look_at(one)
    assert sockets.wait(0) == []
    sockets.close()
    held.close()


def test_what_is_attended_is_heard_until_it_has_ended_and_its_end_is_told_once(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    here, there = pair
    sockets, heard = Sockets({}), list[bytes]()

    def hear() -> bool:
        heard.append(here.recv(9))
        return bool(heard[-1])

    def handle_all() -> int:
        happened = sockets.wait(0)
        for one, flags in happened:
            wasyncore.readwrite(one, flags)
            sockets.look_at(one)
        return len(happened)

    sockets.attend(here.fileno(), hear)
    assert handle_all() == 0
    there.send(b"x")
    assert handle_all() == 1
    there.close()
    assert handle_all() == 1
    assert handle_all() == 0, "an end that is told for ever keeps a core busy"
    assert heard == [b"x", b""]
    sockets.close()


def test_a_server_attends_in_its_own_thread_and_says_what_fails_there(
    app: Flask, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    here, there = pair
    server, heard = Server(app, bind("127.0.0.1", 0), threads=1), list[tuple[str, bytes]]()

    def hear() -> bool:
        heard.append((threading.current_thread().name, here.recv(9)))
        if heard[-1][1] == b"bad":
            raise ZeroDivisionError
        return True

    server.attend(here.fileno(), hear)
    server.start()
    there.send(b"good")
    until(lambda: len(heard) == 1, "the first to be heard")
    there.send(b"bad")
    until(lambda: len(heard) == 2, "the second to be heard")
    there.send(b"to nobody")
    with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 200"
    server.stop(0)
    assert heard == [("http", b"good"), ("http", b"bad")]
    assert "ZeroDivisionError" in caplog.text


def test_a_connection_that_was_silent_for_long_is_closed_and_one_that_waits_for_its_answer_is_not(
    server: Server, engine: FakeEngine
) -> None:
    engine.hold()
    ask = b'{"prompt": "hi", "max_tokens": 4}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    where = server.host, server.port
    with socket.create_connection(where, DEADLINE_S) as silent, socket.create_connection(where, DEADLINE_S) as waits:
        waits.sendall(head % len(ask) + ask)
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        for channel in server._waitress.active_channels.values():
            channel.last_activity = 0.0
        server._waitress.next_channel_cleanup = 0.0
        assert silent.recv(9) == b""
        engine.free.set()
        assert waits.recv(12) == b"HTTP/1.1 200"


def test_who_reads_slowly_gets_large_answers_one_after_the_other(server: Server) -> None:
    server._waitress.adj.outbuf_high_watermark = 1000  # else 16 MB: who answers waits until there is less to be sent
    server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(DEADLINE_S)
        sock.connect((server.host, server.port))
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n"
        sock.sendall(ask + b"\r\n" + ask + b"Connection: close\r\n\r\n")
        got = b""
        while data := sock.recv(1 << 14):
            got += data
            time.sleep(0.001)
    assert len(got) > 50_000
    assert got.count(b"HTTP/1.1 200 OK") == 2
    _, first, second = got.split(b"HTTP/1.1 200 OK")
    assert json.loads(first.partition(b"\r\n\r\n")[2]) == json.loads(second.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("num_unsent", [0, 1])
def test_who_has_all_sockets_runs_no_request_whose_answer_may_have_to_wait_for_room(
    num_unsent: int, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, pool = Server(app, bind("127.0.0.1", 0), threads=1), list[Any]()
    monkeypatch.setattr(server._waitress.task_dispatcher, "add_task", pool.append)
    request = SimpleNamespace(error=None, chunked=False, path="/v1/completions", content_length=2)
    channel = SimpleNamespace(requests=[request], total_outbufs_len=num_unsent)
    server._waitress.add_task(channel)
    assert (len(server._asked), len(pool)) == (1 - num_unsent, num_unsent)
    server.stop(0)
