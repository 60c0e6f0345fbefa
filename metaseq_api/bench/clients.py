"""Clients of a completion server, many in one thread: raw sockets, epoll, and as little work for a byte as there is, so
that little of the machine that is measured goes to the measuring; what does is told.

Knows HTTP as far as this server speaks it; `watched` knows as much of others. Does not know what is measured or why.
Imports neither torch nor the server.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from metaseq_api.bench.watching import watched

PATH = "/v1/completions"
_DONE = b"data: [DONE]"


def child(host: str, port: int) -> None:
    """Read orders, one JSON object a line, from stdin; answer each with a line: {"seconds": [...], "cpu": ...}.

    An order is {"what": "streams", "bodies": [...]}, {"what": "requests", "bodies": [...], "num_each": ...}, or
    {"what": "watched", "bodies": [...], "headers": [...], "at": [seconds] or None, "concurrency": ...}.
    """
    for line in sys.stdin:
        order = json.loads(line)
        bodies = [request(body, order.get("path", PATH), order.get("headers", ())) for body in order["bodies"]]
        began, cpu = time.perf_counter(), time.process_time()
        out: dict[str, Any] = {}
        if order["what"] == "streams":
            out["seconds"] = streams(host, port, bodies)
        elif order["what"] == "watched":
            out["answers"] = watched(host, port, bodies, at=order["at"], concurrency=order["concurrency"])
        else:
            out["seconds"] = requests(host, port, bodies, order["num_each"])
        out |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - began}
        sys.stdout.write(json.dumps(out) + "\n")
        sys.stdout.flush()


def request(body: dict[str, Any], path: str = PATH, headers: Sequence[str] = ()) -> bytes:
    """What goes over the wire."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: bench", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


def _connect(host: str, port: int, num: int) -> dict[int, socket.socket]:
    socks = [socket.create_connection((host, port)) for _ in range(num)]
    for sock in socks:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {s.fileno(): s for s in socks}


def streams(host: str, port: int, bodies: list[bytes]) -> list[float]:
    """One stream for each body, all at once; when each had ended. Units: seconds from the first request."""
    socks, ended = _connect(host, port, len(bodies)), []
    poller = select.epoll()
    tails = dict.fromkeys(socks, b"")
    began = time.perf_counter()
    for (fd, sock), body in zip(socks.items(), bodies, strict=True):
        sock.send(body)
        poller.register(fd, select.EPOLLIN)
    while socks:
        for fd, _ in poller.poll():
            data = socks[fd].recv(1 << 16)
            if data:
                tails[fd] = (tails[fd] + data)[-64:]
                continue
            assert _DONE in tails[fd], f"a stream broke off: {tails[fd]!r}"
            ended.append(time.perf_counter() - began)
            poller.unregister(fd)
            socks.pop(fd).close()
    return ended


def requests(host: str, port: int, bodies: list[bytes], num_each: int) -> list[float]:
    """On one connection for each body, that body so many times, one after the other; how long each took."""
    socks, took = _connect(host, port, len(bodies)), []
    body_of = dict(zip(socks, bodies, strict=True))
    left = dict.fromkeys(socks, num_each)
    got = dict.fromkeys(socks, b"")
    poller, sent = select.epoll(), {}
    for fd, sock in socks.items():
        sent[fd] = time.perf_counter()
        sock.send(body_of[fd])
        poller.register(fd, select.EPOLLIN)
    while socks:
        for fd, _ in poller.poll():
            data = socks[fd].recv(1 << 16)
            assert data, "the server hung up"
            got[fd] += data
            if not _is_whole(got[fd]):
                continue
            assert got[fd].startswith(b"HTTP/1.1 200"), got[fd]
            now = time.perf_counter()
            took.append(now - sent[fd])
            got[fd] = b""
            left[fd] -= 1
            if left[fd]:
                sent[fd] = now
                socks[fd].send(body_of[fd])
            else:
                poller.unregister(fd)
                socks.pop(fd).close()
    return took


def _is_whole(answer: bytes) -> bool:
    head, mark, body = answer.partition(b"\r\n\r\n")
    at = head.find(b"Content-Length: ")
    return bool(mark) and len(body) >= int(head[at + 16 : head.find(b"\r\n", at) if b"\r\n" in head[at:] else None])
