"""Files over HTTP on 127.0.0.1, served as well as a plain server does it, or as badly as a test asks for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import socket
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Fault = Callable[["Handler", bytes], None]
"""What answers one request in place of the server's own manners; the bytes are the file's."""


class Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        path, _, query = self.path.partition("?")
        with self.server.lock:
            self.server.asked.append((path, query, {k.lower(): v for k, v in self.headers.items()}))
            content = self.server.files.get(path)
            waiting = self.server.faults.get(path, [])
            fault = (
                None if "Range" in self.headers and self.headers["Range"] == "bytes=0-0" else self.server.pop(waiting)
            )
        fault = fault or self.server.always.get(path)
        try:
            if content is None:
                self.say(404, {"Content-Length": "0"})
            elif fault is not None:
                fault(self, content)
            else:
                self.plain(content)
        except OSError:
            pass  # the client went away, which is its right

    def say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def part(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body as a good server gives them."""
        headers = self.server.validators(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.headers.get("If-Range") not in (None, *headers.values()):
            return 200, headers | {"Content-Length": str(len(content))}, content
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}, b""
        body = content[first : last + 1]
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Content-Length": str(len(body))}
        return 206, headers, body

    def plain(self, content: bytes) -> None:
        self.say(*self.part(content))


class FileServer(ThreadingHTTPServer):
    """`files` by path; `faults[path]` are used up one for each transfer (not by a question for the length alone),
    then `always[path]` answers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault | None]] = {}
        self.always: dict[str, Fault] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.closing = threading.Event()
        self.validators: Callable[[bytes], dict[str, str]] = etag

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @staticmethod
    def pop(waiting: list[Fault | None]) -> Fault | None:
        return waiting.pop(0) if waiting else None

    def ranges(self, path: str) -> list[str | None]:
        """The ranges that transfers of a file asked for, in order."""
        with self.lock:
            found = [headers.get("range") for asked, _, headers in self.asked if asked == path]
        return [r for r in found if r != "bytes=0-0"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that resets a connection


@contextlib.contextmanager
def serving() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join(10)


def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and no name but this machine's is looked up: a test that would go further fails."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    look_up = socket.getaddrinfo

    def here(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host == "127.0.0.1", f"a test would have contacted {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", here)


def pt_file(size: int, seed: int = 0) -> bytes:
    """A zip archive, as torch.save makes one, of about this size."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data/0", random.Random(seed).randbytes(size))
    return out.getvalue()


def etag(content: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.sha256(content).hexdigest()[:12]}"'}


def weak_etag(content: bytes) -> dict[str, str]:
    return {"ETag": f"W/{etag(content)['ETag']}"}


def modified(content: bytes) -> dict[str, str]:
    return {"Last-Modified": f"Tue, 03 May 2022 00:00:{len(content) % 60:02} GMT"}


def breaks_off(after: int) -> Fault:
    """Promises all and closes after some bytes."""

    def fault(handler: Handler, content: bytes) -> None:
        status, headers, body = handler.part(content)
        handler.say(status, headers, body[:after])

    return fault


def resets(after: int) -> Fault:
    """As a router does that forgot the connection."""

    def fault(handler: Handler, content: bytes) -> None:
        breaks_off(after)(handler, content)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return fault


def stalls(after: int) -> Fault:
    """Sends some bytes and then nothing, with the connection open."""

    def fault(handler: Handler, content: bytes) -> None:
        breaks_off(after)(handler, content)
        handler.wfile.flush()
        handler.server.closing.wait(30)

    return fault


def dribbles(size: int) -> Fault:
    """Sends a little at a time."""

    def fault(handler: Handler, content: bytes) -> None:
        status, headers, body = handler.part(content)
        handler.say(status, headers)
        for i in range(0, len(body), size):
            handler.wfile.write(body[i : i + size])
            handler.wfile.flush()

    return fault


def answers(status: int, body: bytes = b"no", **headers: str) -> Fault:
    """Header names with _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.say(status, {"Content-Length": str(len(body))} | named, body)


def ignores_range(after: int | None = None) -> Fault:
    return lambda handler, content: handler.say(
        200, handler.server.validators(content) | {"Content-Length": str(len(content))}, content[:after]
    )


def claims(length: int) -> Fault:
    """Says the file is so long, and sends what it has."""
    return lambda handler, content: handler.say(
        200, handler.server.validators(content) | {"Content-Length": str(length)}, content
    )


def part_headers(**replaced: str | None) -> Fault:
    """A good answer but for some headers; None leaves one out."""

    def fault(handler: Handler, content: bytes) -> None:
        status, headers, body = handler.part(content)
        named = {name.replace("_", "-"): value for name, value in replaced.items()}
        handler.say(status, {k: v for k, v in (headers | named).items() if v is not None}, body)

    return fault


def then(fault: Fault, change: Callable[[], object]) -> Fault:
    """Something happens on the server right after this answer."""

    def both(handler: Handler, content: bytes) -> None:
        fault(handler, content)
        change()

    return both
