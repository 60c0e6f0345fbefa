"""A line between two processes of one service: whole messages of JSON over a pair of sockets, never a pickle.

Knows where a message ends, and that the other side has gone. Does not know what is said.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from metaseq_api.core.plain import to_plain

log = logging.getLogger(__name__)

Message = bytes | Callable[[], bytes]
_LARGE = 1 << 20
_HEAD = struct.Struct("!I")
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=to_plain).encode


def written(*message: Any) -> bytes:
    """A message as it goes over a line, nouns as `plain` has them."""
    data = _encode(message).encode("ascii")
    return _HEAD.pack(len(data)) + data


class Line:
    """One end. Any thread may send, and never waits; one thread receives. Another, of its own, does the sending."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said = sock.makefile("rb")
        self._out: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._send, name="line sends", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Say something, now written down; that nobody hears it any more is for whoever receives to find out."""
        self.put(written(*message))

    def put(self, message: Message) -> None:
        """Send messages that are `written`, or have that done by the thread that sends: for large ones."""
        self._out.put(message)

    def messages(self) -> Iterator[list[Any]]:
        """What the other side says, until it has gone."""
        while not self._said.closed and len(head := self._read(_HEAD.size)) == _HEAD.size:
            (length,) = _HEAD.unpack(head)
            data = self._read(length)
            if len(data) < length:
                break
            yield json.loads(data)
        self.hang_up()
        self._said.close()
        self._sock.close()

    def hang_up(self) -> None:
        """Have whoever receives, at either end, find that the other has gone."""
        self._out.put(None)
        with contextlib.suppress(OSError):  # the other side was quicker
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, num: int) -> bytes:
        try:
            return self._said.read(num)
        except OSError:  # reset: it died with something unread
            return b""

    def _send(self) -> None:
        try:
            while (data := self._waiting()) is not None:
                self._sock.sendall(data)
        except OSError as e:
            log.debug("nobody is at the other end: %s", e)
        finally:
            self.hang_up()  # whatever happened: nobody may wait for an answer that does not come

    def _waiting(self) -> bytes | None:
        """Wait for something to send; all there is, up to a large one. None where the line is to end."""
        data: list[bytes] = []
        with contextlib.suppress(queue.Empty):
            while not data or len(data[-1]) < _LARGE:
                message = self._out.get(block=not data)
                if message is None:
                    return None
                data.append(message() if callable(message) else message)
        return b"".join(data)
