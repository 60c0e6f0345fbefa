"""HAProxy's configuration and commands: golden text, what a slot is told, and what the real program makes of it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.load import Asker
from support.processes import until
from support.proxy import need_haproxy

from metaseq_api.errors import ResourceError
from metaseq_api.launch import haproxy
from metaseq_api.launch.haproxy import EMPTY, Slot, changes

GOLDEN = Path(__file__).with_name("golden") / "haproxy.cfg"
READY = Slot(state="ready", address="10.0.0.7", port=4711, at_once=256)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n" + b'{"choices": [1]}'


def test_the_configuration_is_as_agreed() -> None:
    assert haproxy.config(listen_fd=7, runtime_fd=8, slots=64) == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (EMPTY, EMPTY, []),
        (
            EMPTY,
            READY,
            [
                "set server members/member2 addr 10.0.0.7 port 4711",
                "set maxconn server members/member2 256",
                "set server members/member2 state ready",
            ],
        ),
        (READY, READY, []),
        (
            READY,
            Slot(state="drain", address="10.0.0.7", port=4711, at_once=256),
            ["set server members/member2 state drain"],
        ),
        (
            READY,
            Slot(state="maint", address="10.0.0.7", port=4711, at_once=256),
            ["set server members/member2 state maint"],
        ),
        (
            READY,
            Slot(state="ready", address="10.0.0.8", port=4711, at_once=256),
            [
                "set server members/member2 state maint",
                "set server members/member2 addr 10.0.0.8 port 4711",
                "set server members/member2 state ready",
            ],
        ),
    ],
    ids=["nothing", "joins", "as before", "drains", "leaves", "comes back elsewhere"],
)
def test_a_slot_is_told_what_is_new(old: Slot, new: Slot, said: list[str]) -> None:
    assert changes(2, old, new) == said


def test_without_haproxy_it_is_said_what_to_do() -> None:
    with pytest.raises(ResourceError, match=r"/nowhere/haproxy is not found here; have it .* --haproxy FILE"):
        haproxy.find("/nowhere/haproxy")


class Member:
    """A server that does one thing with each request, but for health checks, and counts them."""

    def __init__(self, act: Callable[[socket.socket], None] | None) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.heads: list[bytes] = []
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._sock.accept()
                with client, contextlib.suppress(OSError):
                    head = client.recv(1 << 20)
                    if head.startswith(b"GET /ready"):
                        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    elif head and self._act:
                        self.heads.append(head)
                        self._act(client)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(10)


def refuse(status: int) -> Callable[[socket.socket], None]:
    body = json.dumps({"error": {"code": "engine_stopped"}}).encode()
    return lambda client: client.sendall(
        b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)) + body
    )


@pytest.fixture
def front() -> Iterator[Callable[..., str]]:
    """A running HAProxy in front of these members; its URL."""
    need_haproxy()
    with contextlib.ExitStack() as ends:

        def start(*members: Member) -> str:
            for member in members:
                ends.callback(member.close)
            sock = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
            process, runtime = haproxy.start(haproxy.find(), sock, 64)
            ends.callback(runtime.close)
            ends.callback(process.wait)
            ends.callback(process.kill)
            for number, member in enumerate(members):
                new = Slot(state="ready", address="127.0.0.1", port=member.port, at_once=8)
                for command in changes(number, EMPTY, new):
                    runtime.say(command)
            return f"http://127.0.0.1:{sock.getsockname()[1]}"

        yield start


def ask(url: str, times: int, **body: str) -> list[str]:
    asker = Asker(url, "a-key-of-a-client")
    return [asker.complete(prompt="x", **body) for _ in range(times)]


def test_what_a_member_has_not_begun_is_sent_to_another(front: Callable[..., str]) -> None:
    going, good = Member(refuse(425)), Member(lambda client: client.sendall(ANSWER))
    assert ask(front(going, good), 6) == ["answered"] * 6
    assert going.heads
    assert len(good.heads) == 6
    assert all(b"X-Retry-Elsewhere: 1" in h or b"x-retry-elsewhere: 1" in h for h in going.heads + good.heads)
    assert all(b"Bearer a-key-of-a-client" in h for h in good.heads)


def test_a_long_prompt_is_sent_to_another_too(front: Callable[..., str]) -> None:
    going, good = Member(refuse(425)), Member(lambda client: client.sendall(ANSWER))
    assert ask(front(going, good), 4, filler="x" * 100_000) == ["answered"] * 4


def test_where_no_member_begins_it_the_client_is_told_503(front: Callable[..., str]) -> None:
    assert ask(front(Member(refuse(425)), Member(refuse(425))), 1) == ["503 engine_stopped"]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda client: None, "502 member_lost"),
        (refuse(503), "503 engine_stopped"),
        (refuse(500), "500 engine_stopped"),
    ],
    ids=["the connection broke", "503", "500"],
)
def test_what_may_have_been_begun_is_never_sent_again(
    front: Callable[..., str], act: Callable[[socket.socket], None], says: str
) -> None:
    members = [Member(act), Member(act), Member(act)]
    assert ask(front(*members), 3) == [says] * 3
    assert sum(len(m.heads) for m in members) == 3


def test_a_member_whose_door_is_shut_costs_nobody_a_request(front: Callable[..., str]) -> None:
    shut, good = Member(None), Member(lambda client: client.sendall(ANSWER))
    url = front(shut, good)
    shut.close()
    assert ask(url, 3) == ["answered"] * 3


def test_without_a_member_the_proxy_answers_in_the_shape_of_every_other_error(front: Callable[..., str]) -> None:
    assert ask(front(), 1) == ["503 no_member"]


def test_the_least_loaded_member_is_asked(front: Callable[..., str]) -> None:
    over = threading.Event()

    def hold(client: socket.socket) -> None:
        over.wait(30)
        client.sendall(ANSWER)

    slow, good = Member(hold), Member(lambda client: client.sendall(ANSWER))
    url = front(slow, good)
    clients: list[threading.Thread] = []
    try:
        while not slow.heads:  # one at a time: while the good one has a client too, both are as busy
            clients.append(threading.Thread(target=ask, args=(url, 1)))
            clients[-1].start()
            until(lambda: slow.heads or not clients[-1].is_alive(), "a client to be held or answered")
        assert ask(url, 5) == ["answered"] * 5
        assert len(slow.heads) == 1
    finally:
        over.set()
        for client in clients:
            client.join(30)
