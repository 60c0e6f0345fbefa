"""A line between two processes of one service: whole messages of JSON over a pair of sockets, never a pickle.

Knows where a message ends, and that the other side has gone. Does not know what is said.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

_HEAD = struct.Struct("!I")
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def written(*message: Any) -> bytes:
    """A message as it goes over a line."""
    data = _encode(message).encode("ascii")
    return _HEAD.pack(len(data)) + data


class Line:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said = sock.makefile("rb")
        self._sending = threading.Lock()

    def send(self, *message: Any) -> bool:
        """Say something; whether somebody may still hear it. Waits where the other side is slow to read."""
        return self.write(written(*message))

    def write(self, data: bytes) -> bool:
        """Send messages that are `written`; as `send`."""
        try:
            with self._sending:
                self._sock.sendall(data)
        except OSError:  # it has gone; whoever receives here finds out
            return False
        return True

    def messages(self) -> Iterator[list[Any]]:
        """What the other side says, until it has gone."""
        while not self._said.closed and len(head := self._said.read(_HEAD.size)) == _HEAD.size:
            (length,) = _HEAD.unpack(head)
            data = self._said.read(length)
            if len(data) < length:
                break
            yield json.loads(data)
        self.hang_up()
        self._said.close()
        self._sock.close()

    def hang_up(self) -> None:
        """Have whoever receives, at either end, find that the other has gone."""
        with contextlib.suppress(OSError):  # the other side was quicker
            self._sock.shutdown(socket.SHUT_RDWR)
