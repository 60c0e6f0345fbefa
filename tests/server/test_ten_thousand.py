"""Ten thousand bad requests against a real server and a real engine: whatever comes, each is answered (never by a 500)
unless its client left, a good request right after it is too, and nothing is leaked."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from support.bad_requests import PATHS, Case, http, make
from support.engines import running_engine
from support.processes import until

from metaseq_api.engine.engine import Engine
from metaseq_api.server.app import create_app
from metaseq_api.server.port import bind
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings

NUM, BATCH, CLIENTS = 10_000, 1000, 12
DEADLINE_S = 30
PATIENCE = 12
"""Cases that go by between two pieces of one that is sent slowly, and before the answer of a late reader is read."""
GOOD = http(json.dumps({"prompt": [5, 6], "max_tokens": 1, "temperature": 0, "ignore_eos": True}).encode(), PATHS[0])


class Wire(io.BufferedReader):
    """A socket's bytes, which several HTTPResponses in turn read from."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(socket.SocketIO(sock, "r"))

    def makefile(self, *_: Any) -> Any:
        return self

    def close(self) -> None:
        """Not when a response ends."""


class Client:
    """One thread's share of a batch: its cases one after another, with a good request after each."""

    def __init__(self, address: tuple[str, int], numbers: range) -> None:
        self.address, self.numbers = address, numbers
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.num_cases = self.num_good = 0
        self.faults: list[str] = []
        self.good_text: str | None = None
        self._waiting: list[Iterator[None]] = []

    def run(self) -> None:
        for number in self.numbers:
            case = make(number)
            try:
                running = self._ask(case, random.Random(number))
                if next(running, running) is not running:
                    self._waiting.append(running)
                self._go_on(number)
            except (AssertionError, OSError, HTTPException, ValueError) as e:
                self.faults.append(f"case {number} ({case.kind}, {case.how}) {case.raw[:400]!r}: {e!r}"[:1500])
            self.num_cases += 1
        while self._waiting:
            self._go_on(0)

    def _go_on(self, number: int) -> None:
        """Let what is sent or read slowly have its turn."""
        for running in list(self._waiting):
            if (number or 0) % PATIENCE == 0 and next(running, running) is running:
                self._waiting.remove(running)

    def _ask(self, case: Case, r: random.Random) -> Iterator[None]:
        """Send a case as it says; waits with `yield` where others go first."""
        with socket.create_connection(self.address, timeout=DEADLINE_S) as sock:
            if case.how == "pieces":
                cuts = sorted(r.sample(range(1, len(case.raw)), 3))
                for start, stop in zip([0, *cuts], [*cuts, len(case.raw)], strict=True):
                    sock.sendall(case.raw[start:stop])
                    yield
            else:
                with contextlib.suppress(ConnectionError):  # refused before all was read; the answer says why
                    sock.sendall(case.raw)
            if case.how == "late":
                yield
            wire = Wire(sock)
            if case.how in ("whole", "pieces", "late"):
                self._read_all(case, sock, wire)
                return
            if case.how == "begun":
                wire.peek(1)
            match r.randrange(3):
                case 0:
                    sock.shutdown(socket.SHUT_WR)
                case 1:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._good_elsewhere()

    def _read_all(self, case: Case, sock: socket.socket, wire: Wire) -> None:
        for method in case.methods:
            response = self._read(wire, method)
            status = response.status
            self.statuses[case.kind, status] += 1
            assert status in case.statuses, (status, response.said)
            if response.will_close:
                self._good_elsewhere()
                return
        sock.sendall(GOOD)
        self._check_good(self._read(wire, "POST"))

    def _good_elsewhere(self) -> None:
        with socket.create_connection(self.address, timeout=DEADLINE_S) as sock:
            sock.sendall(GOOD)
            self._check_good(self._read(Wire(sock), "POST"))

    def _check_good(self, response: Any) -> None:
        assert response.status == 200, response.said
        text = json.loads(response.said)["choices"][0]["text"]
        self.good_text = self.good_text or text
        assert text == self.good_text
        self.num_good += 1

    def _read(self, wire: Wire, method: str) -> Any:
        """One whole answer, its body in `said`; every one is JSON, a stream of it, the page, or nothing at all."""
        response: Any = HTTPResponse(wire, method=method)  # type: ignore[arg-type]
        response.begin()
        response.said = response.read()
        kind = response.headers.get_content_type()
        if not response.said:
            assert method in ("HEAD", "OPTIONS"), "an answer without a word"
        elif kind == "text/event-stream":
            events = response.said.decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""], events[-3:]
            for event in events[:-2]:
                assert json.loads(event.removeprefix("data: "))["choices"]
        elif kind == "application/json":
            said = json.loads(response.said)
            assert response.status == 200 or set(said["error"]) == {"message", "type", "param", "code"}
        else:
            assert (kind, response.status) == ("text/html", 200)
        return response


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with running_engine(tmp_path, max_batch_tokens=256) as engine:
        yield engine


@pytest.fixture
def server(engine: Engine) -> Iterator[Server]:
    server = Server(create_app(engine, Settings()), bind("127.0.0.1", 0), threads=16)
    server.start()
    yield server
    server.stop(5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_bad_requests_are_refused_and_every_good_one_after_them_is_answered(
    engine: Engine, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    statuses: Counter[tuple[str, int]] = Counter()
    num_cases = num_good = 0
    for first in range(0, NUM, BATCH):
        clients = [Client((server.host, server.port), range(first + i, first + BATCH, CLIENTS)) for i in range(CLIENTS)]
        threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10 * DEADLINE_S)
            assert not thread.is_alive(), "a client hangs"
        assert not [fault for client in clients for fault in client.faults]
        assert len({client.good_text for client in clients}) == 1
        until(lambda: is_idle(engine), "the engine to be idle")
        engine._scheduler.check_idle()
        until(lambda: not server._waitress.active_channels, "every connection to be gone")
        assert engine.health().alive
        assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        num_cases += sum(client.num_cases for client in clients)
        num_good += sum(client.num_good for client in clients)
        statuses.update(dict(sum((client.statuses for client in clients), Counter())))
    assert num_cases == num_good == NUM
    by_status = Counter(status for (_, status), num in statuses.items() for _ in range(num))
    assert by_status[200] > 2000
    assert by_status[400] > 2000
    assert set(by_status) >= {200, 400, 404, 405, 413, 415, 431}
    assert not [status for status in by_status if status >= 500 and status not in (501, 504)]


def is_idle(engine: Engine) -> bool:
    """Nothing runs, waits or holds a block."""
    health = engine.health()
    return not health.num_running + health.num_waiting and health.num_free_blocks == health.num_blocks
