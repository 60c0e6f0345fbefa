"""A line between two processes: every message, whole and in its order, from any thread, and nobody waits to say one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from metaseq_api.core.line import Line, written

NUM, LONG = 400, "x" * 5000
Ends = tuple[Line, Line]


@pytest.fixture
def ends() -> Iterator[Ends]:
    a, b = map(Line, socket.socketpair())
    yield a, b
    for line in (a, b):
        line.hang_up()
        list(line.messages())  # closes it


def test_who_says_more_than_the_socket_takes_does_not_wait_and_nothing_is_lost(ends: Ends) -> None:
    here, there = ends

    def say(who: int) -> None:
        for n in range(NUM):
            if n % 7 == 0:
                here.put(lambda n=n: written(who, n, LONG))  # type: ignore[misc]
            else:
                here.send(who, n, LONG if n % 2 else "")

    speakers = [threading.Thread(target=say, args=(who,)) for who in range(4)]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:  # all is said before anything is heard: some 4 MB, of which the socket takes a part
        speaker.join(30)
        assert not speaker.is_alive()
    heard: dict[int, list[int]] = {who: [] for who in range(4)}
    messages = there.messages()
    for _ in range(4 * NUM):
        who, n, text = next(messages)
        assert text == (LONG if n % 2 or n % 7 == 0 else "")
        heard[who].append(n)
    assert all(heard[who] == list(range(NUM)) for who in range(4))
    here.send("still in order")
    assert next(messages) == ["still in order"]


def test_what_is_said_to_nobody_is_no_error_and_the_end_is_heard(ends: Ends) -> None:
    here, there = ends
    there.hang_up()
    for _ in range(3):
        here.send("anybody?", LONG)
    assert list(here.messages()) == []


def test_what_has_come_is_heard_without_waiting_and_only_whole() -> None:
    here, sock = socket.socketpair()
    with here:
        line = Line(sock)
        assert line.heard() == []
        first, second = written("first", LONG), written("second")
        here.sendall(first[:3])
        assert line.heard() == []
        here.sendall(first[3:-1])
        assert line.heard() == []
        here.sendall(first[-1:] + second + second[:-1])
        assert line.heard() == [["first", LONG], ["second"]]
        here.sendall(second[-1:] + second)
        here.shutdown(socket.SHUT_RDWR)
        assert line.heard() == [["second"], ["second"]], "what was said last is heard before the end"
        assert line.heard() is None
        assert line.heard() is None
        assert list(line.messages()) == []
