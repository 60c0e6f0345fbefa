"""The proxy of a service: which members it takes, and how it begins and ends, with a real HAProxy."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.load import Asker
from support.manage import answers
from support.processes import gone, until
from support.proxy import Proxy, need_haproxy

from metaseq_api.launch.haproxy import Slot
from metaseq_api.launch.proxy import LOOK_S, slots_of
from metaseq_api.launch.registry import Record, Registry, Submission, replace_json
from metaseq_api.launch.standing import STALE_S

NOW = 1_795_000_000.0


def record(member: int, state: str, age: float = 1.0, now: float = NOW, port: int = 4711) -> Record:
    at = now - age
    return Record(name="a", member=member, state=state, heartbeat=at, host=f"n{member}", port=port, at_once=256)


def slots(*records: Record) -> dict[int, str]:
    return {n: s.state for n, s in slots_of(records, NOW, lambda host: host).items()}


def test_who_is_ready_gets_requests_who_drains_none_that_are_new_and_others_have_no_place() -> None:
    states = ("ready", "draining", "loading", "starting", "ended")
    found = slots_of([record(n, state) for n, state in enumerate(states)], NOW, lambda host: f"10.0.0.{host[1:]}")
    assert found == {
        0: Slot(state="ready", address="10.0.0.0", port=4711, at_once=256),
        1: Slot(state="drain", address="10.0.0.1", port=4711, at_once=256),
    }


def test_one_that_has_gone_silent_is_left_out_unless_all_have() -> None:
    silent = STALE_S + 1
    assert slots(record(0, "ready"), record(1, "ready", silent)) == {0: "ready"}
    assert slots(record(0, "ready", silent), record(1, "ready", silent)) == {0: "ready", 1: "ready"}


def test_one_whose_name_has_no_address_is_left_out() -> None:
    assert slots_of([record(0, "ready")], NOW, lambda host: "") == {}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with a service `a` that has one member, which does not listen."""
    need_haproxy()
    registry = Registry(tmp_path / "services")
    registry.open()
    registry.claim("a")
    registry.write_submission(Submission(name="a", job="17", model="demo", submitted=time.time()))
    return registry


def join(registry: Registry, member: int, port: int) -> None:
    told = dataclasses.replace(record(member, "ready", now=time.time(), port=port), host="127.0.0.1")
    replace_json(registry.member_file("a", member), dataclasses.asdict(told))


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    started = Proxy("a", "--registry", str(registry.folder), "--host", "127.0.0.1")
    yield started
    started.end()


def other(registry: Registry, *flags: str) -> tuple[int, str]:
    """The exit code and words of a proxy that cannot start."""
    second = Proxy("a", "--registry", str(registry.folder), *flags, wait=False)
    second.process.wait(20)
    return second.end(), second.text


def test_it_tells_where_it_is_and_a_second_one_is_refused(registry: Registry, proxy: Proxy) -> None:
    told = until(lambda: (r := registry.proxy("a")) and r.state == "ready" and r, "its record")
    assert told.url == proxy.url
    code, words = other(registry)
    assert code == 31
    assert f"a has a proxy already, {proxy.url} (job -); end that one first" in words


def test_a_port_that_is_taken_is_said(registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, words = other(registry, "--host", "127.0.0.1", "--port", str(port))
    assert code == 9
    assert f"cannot listen on port {port} of 127.0.0.1" in words
    assert other(registry, "--host", "203.0.113.1")[0] != 0


def test_it_ends_with_its_service(registry: Registry, proxy: Proxy) -> None:
    haproxy = proxy.haproxy
    registry.forget("a")
    assert proxy.process.wait(20) == 0
    assert gone(haproxy)
    assert not registry.path("a").exists()
    assert "a was stopped: nobody new is let in" in (proxy.end(), proxy.text)[1]


def test_a_registry_that_cannot_be_read_changes_nothing(registry: Registry, proxy: Proxy) -> None:
    member = Streaming()
    member.go_on.set()
    away = registry.folder.with_name("away")
    try:
        join(registry, 3, member.port)
        until(lambda: "member 3: ready" in proxy.text, "it to join")
        registry.folder.rename(away)
        looked_twice = time.monotonic() + 2 * LOOK_S
        asker = Asker(proxy.url, "a-key-of-a-client")
        until(
            lambda: asker.complete(prompt="x", stream=True) == "answered" and time.monotonic() > looked_twice, "answers"
        )
        away.rename(registry.folder)
        registry.member_file("a", 3).unlink()
        join(registry, 4, 1)
        until(lambda: "member 4: ready" in proxy.text, "another look")
        assert "member 3: maint" not in proxy.text
    finally:
        member.end()


def test_that_haproxy_died_is_told_and_ends_it(registry: Registry, proxy: Proxy) -> None:
    os.kill(proxy.haproxy, signal.SIGKILL)
    assert proxy.process.wait(20) == 20
    assert "HAProxy ended by itself (exit code -9)" in (proxy.end(), proxy.text)[1]
    ended = registry.proxy("a")
    assert ended
    assert (ended.state, ended.exit_code) == ("ended", 20)


def test_haproxy_does_not_outlive_it(proxy: Proxy) -> None:
    haproxy = proxy.haproxy
    proxy.process.kill()
    until(lambda: gone(haproxy), "HAProxy to be gone", 10)


class Streaming:
    """A member with one stream in it: begun at once, ended when told."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.begun, self.go_on, self.over = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self.over:
            client, _ = self._sock.accept()
            with client:
                if client.recv(1 << 16).startswith(b"POST"):
                    client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ndata: x\n\r\n")
                    self.begun.set()
                    self.go_on.wait(30)
                    client.sendall(b"f\r\n\ndata: [DONE]\n\n\r\n0\r\n\r\n")
                else:
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def end(self) -> None:
        self.over = True
        self.go_on.set()
        socket.create_connection(("127.0.0.1", self.port), 10).close()
        self._thread.join(30)
        self._sock.close()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_told_to_end_it_lets_nobody_new_in_and_a_running_stream_comes_to_its_end(
    registry: Registry, proxy: Proxy, signum: int
) -> None:
    found: list[str] = []
    member = Streaming()
    asker = Asker(proxy.url, "a-key-of-a-client")
    client = threading.Thread(target=lambda: found.append(asker.complete(prompt="x", stream=True)))
    try:
        join(registry, 3, member.port)
        until(lambda: "member 3: ready" in proxy.text, "it to join")
        client.start()
        assert member.begun.wait(20)
        proxy.process.send_signal(signum)
        until(lambda: not answers(int(proxy.url.rpartition(":")[2])), "the door to be shut")
        member.go_on.set()
        client.join(20)
    finally:
        member.end()
    assert found == ["answered"]
    assert proxy.process.wait(20) == 0
    assert "nobody new is let in" in (proxy.end(), proxy.text)[1]
