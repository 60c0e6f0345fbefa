"""Streams whose every event is timed, each on a connection of its own: so many at once, or each at its own time.

One thread, epoll, and no JSON: events are told by the mark they begin with. Knows server-sent events and the usage that
OpenAI's `stream_options` adds at the end. Does not know what is made of the times.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_FINE = b"HTTP/1.1 200"
_MARK = b"data: {"
_DONE = b"data: [DONE]"
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_TAIL = 2048
"""Units: bytes; the usage and all that follows it are shorter."""


@dataclass(slots=True)
class Answer:
    """One stream as its client sees it. `due`: when it was to be sent; events: when each came, the usage left out.

    Units: seconds from the first moment of the run.
    """

    due: float
    events: list[float] = field(default_factory=list)
    tail: bytes = b""
    num_tokens: int = 0
    """As the server counted them."""
    error: str = ""

    def feed(self, data: bytes, now: float) -> None:
        """Bytes came."""
        seam = self.tail[1 - len(_MARK) :]  # a mark may be cut in two
        self.events += [now] * (seam + data).count(_MARK)
        self.error = self.error or self._refusal(data)
        self.tail = (self.tail + data)[-_TAIL:]

    def end(self) -> None:
        """The server has closed the connection."""
        usage = _USAGE.findall(self.tail)
        if self.error:
            return
        if _DONE not in self.tail:
            self.error = "the stream broke off"
        elif not usage:
            self.error = "the stream ended without its usage"
        else:
            self.events.pop()  # the usage's own
            self.num_tokens = int(usage[-1])
            self.error = "" if self.events else "the stream held no text"

    def _refusal(self, data: bytes) -> str:
        if self.tail or data.startswith(_FINE) or _FINE.startswith(data):
            return ""
        return data.split(b"\r\n", 1)[0].decode("latin1")

    def told(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {"due": self.due, "events": self.events, "num_tokens": self.num_tokens, "error": self.error}


def watched(
    host: str,
    port: int,
    bodies: Sequence[bytes],
    *,
    at: Sequence[float] | None,
    concurrency: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Send each body, at its time, or when fewer than `concurrency` are being answered; every answer, in order.

    A body is due when its time has come, whether or not this process is late: what the client waits counts.
    """
    began, poller, answers = clock(), select.epoll(), list[Answer]()
    running: dict[int, tuple[socket.socket, Answer]] = {}
    while len(answers) < len(bodies) or running:
        now = clock() - began
        while len(answers) < len(bodies) and (len(running) < concurrency if at is None else at[len(answers)] <= now):
            answers.append(Answer(now if at is None else at[len(answers)]))
            try:
                sock = _send(host, port, bodies[len(answers) - 1])
            except OSError as e:
                answers[-1].error = f"no connection to {host}:{port}: {e.strerror or e}"
                continue
            running[sock.fileno()] = sock, answers[-1]
            poller.register(sock, select.EPOLLIN)
        if not running and len(answers) == len(bodies):
            break  # nobody was let in
        wait = None if at is None or len(answers) == len(bodies) else max(at[len(answers)] - (clock() - began), 0)
        for fd, _ in poller.poll(wait):
            sock, answer = running[fd]
            data = _receive(sock)
            if data:
                answer.feed(data, clock() - began)
                continue
            answer.end()
            poller.unregister(fd)
            running.pop(fd)[0].close()
    return [answer.told() for answer in answers]


def _send(host: str, port: int, body: bytes) -> socket.socket:
    sock = socket.create_connection((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(body)
    sock.setblocking(False)
    return sock


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except ConnectionResetError:
        return b""
