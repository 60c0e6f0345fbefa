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
    """One end. Any thread may send, and never waits; one thread receives.

    What the socket has no room for is sent by a thread of its own. That thread costs who computes more than the sending
    does: it wants the interpreter, and the other side hears of a step 1.5 ms later (2026-11-29).
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._said = bytearray()
        self._out: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._order = threading.Lock()
        self._num_left = 0  # messages that the thread has not sent yet
        threading.Thread(target=self._send, name="line sends", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Say something, now written down; that nobody hears it any more is for whoever receives to find out."""
        self.put(written(*message))

    def put(self, message: Message) -> None:
        """Send messages that are `written`, or have that done by the thread that sends: for large ones."""
        with self._order:
            if not self._num_left and isinstance(message, bytes):
                message = message[self._send_at_once(message) :]
            if message:
                self._num_left += 1
                self._out.put(message)

    def fileno(self) -> int:
        """Of the socket: to wait for what `heard` would read."""
        return self._sock.fileno()

    def messages(self) -> Iterator[list[Any]]:
        """What the other side says, waiting for it, until it has gone."""
        while True:
            while (message := self._cut()) is not None:
                yield message
            if not self._read(0):
                break
        self.hang_up()
        self._sock.close()

    def heard(self) -> list[list[Any]] | None:
        """What the other side has said by now, without waiting; None once it has gone."""
        goes_on = self._read(socket.MSG_DONTWAIT)
        heard = list(iter(self._cut, None))
        return heard if heard or goes_on else None

    def hang_up(self) -> None:
        """Have whoever receives, at either end, find that the other has gone."""
        self._out.put(None)
        with contextlib.suppress(OSError):  # the other side was quicker
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, flags: int) -> bool:
        """Read some of what has come; whether there may be more some time."""
        try:
            data = self._sock.recv(_LARGE, flags)
        except BlockingIOError:
            return True
        except OSError:  # reset: it died with something unread
            return False
        self._said += data
        return bool(data)

    def _cut(self) -> list[Any] | None:
        """The next whole message of what was read."""
        said = self._said
        if len(said) < _HEAD.size:
            return None
        end = _HEAD.size + _HEAD.unpack_from(said)[0]
        if len(said) < end:
            return None
        message: list[Any] = json.loads(said[_HEAD.size : end].decode("ascii"))
        del said[:end]
        return message

    def _send_at_once(self, message: bytes) -> int:
        """How much of it the socket takes now; of what nobody will hear any more, all."""
        try:
            return self._sock.send(message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as e:
            log.debug("nobody is at the other end: %s", e)
            self.hang_up()
            return len(message)

    def _send(self) -> None:
        try:
            while (waiting := self._waiting()) is not None:
                self._sock.sendall(b"".join(waiting))
                with self._order:
                    self._num_left -= len(waiting)
        except OSError as e:
            log.debug("nobody is at the other end: %s", e)
        finally:
            self.hang_up()  # whatever happened: nobody may wait for an answer that does not come

    def _waiting(self) -> list[bytes] | None:
        """Wait for something to send; all there is, up to a large one. None where the line is to end."""
        data: list[bytes] = []
        with contextlib.suppress(queue.Empty):
            while not data or len(data[-1]) < _LARGE:
                message = self._out.get(block=not data)
                if message is None:
                    return None
                data.append(message() if callable(message) else message)
        return data
