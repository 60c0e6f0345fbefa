"""One connection under waitress: what it refuses by itself in JSON, word of a client that left, and streams without a
thread.

The thread that served the request writes the head of a streamed answer and goes back to its pool. From there on the one
thread that has all sockets renders and sends what has come, for all streams in one go after each step of the engine:
a thread for each would wake hundreds of times a step, to be in the way of the thread that computes.

Knows waitress's channels and tasks. Does not know the app, or what a stream says.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask

from metaseq_api.errors import PayloadTooLarge, RequestError
from metaseq_api.server.app import MAX_BODY, TAKE_OVER, WHEN_GONE
from metaseq_api.server.schema import render_error
from metaseq_api.server.stream import Stream, stopping, too_slow

MAX_HEADER = 64 << 10
"""Units: bytes."""
MAX_UNREAD = 1 << 20
"""Units: bytes of a stream, beyond what the kernel holds, that its client has not read; with more it is ended.

One part may be larger by itself (an echoed prompt with its scores), and is then allowed besides.
"""


class _TakenOver(BaseException):
    """Not an error: leaves HTTPChannel.service before it would end the request, for its stream goes on."""


def _error_of_parser(status: int, says: str) -> RequestError:
    if status == 413:
        return PayloadTooLarge(f"the body is longer than {MAX_BODY} bytes; send fewer prompts at once")
    if status == 431:
        error = RequestError(f"the headers are longer than {MAX_HEADER} bytes; shorten them", code="headers_too_large")
    elif status == 501:
        error = RequestError("the Transfer-Encoding is not known here; use chunked or none", code="not_implemented")
    else:
        error = RequestError(f"the request is not HTTP as this server reads it ({says[:200]})", code="bad_request")
    return error


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress has no types
    """What waitress refuses by itself, before the app sees it, in the shape of every other error."""

    def execute(self) -> None:
        found = self.request.error
        body = json.dumps(render_error(_error_of_parser(found.code, str(found.body)))).encode()
        self.status = f"{found.code} {found.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):  # type: ignore[misc]
    """A request whose app may hand over a stream, and be told when the client goes."""

    stream: Stream | None = None

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[WHEN_GONE] = self.channel.when_gone
        environ[TAKE_OVER] = self._take_over
        return environ

    def build_response_header(self) -> bytes:
        if self.channel.server.hanging_up:
            self.set_close_on_finish()
        head: bytes = super().build_response_header()
        return head

    def _take_over(self, stream: Stream) -> None:
        self.stream = stream

    def finish(self) -> None:
        self.channel.when_gone(None)
        if self.stream is None:
            super().finish()
            return
        try:
            self.write(b"")  # the head
        finally:  # also where the client has left already: the stream is told by the thread that has it
            self.channel.begin(self.stream, chunked=self.chunked_response)
        raise _TakenOver


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection.

    The server it belongs to has `wake`, by which the thread of all sockets calls `handle_write`, and `hanging_up`:
    whether an answer is to end its connection.
    """

    task_class = _Task
    error_task_class = _JsonErrorTask
    requests: list[Any]
    served = False
    """Whether it ever brought a request."""
    _stream: Stream | None = None
    _chunked = False
    _largest = 0
    _call_when_gone: Callable[[], None] | None = None

    # what the thread of a request calls

    def service(self) -> None:
        self.served = True
        with contextlib.suppress(_TakenOver):
            super().service()

    def when_gone(self, call: Callable[[], None] | None) -> None:
        """Have this called, once or twice, when the client goes away before the request has ended."""
        self._call_when_gone = call
        if call is not None and not self.connected:
            call()

    def begin(self, stream: Stream, *, chunked: bool) -> None:
        """Leave a stream, the head of which was written, to the thread of all sockets."""
        self._chunked, self._stream = chunked, stream
        stream.watch(self._wake)
        self._wake()

    def _wake(self) -> None:
        self.server.wake(self)

    # what the thread of all sockets calls

    def handle_write(self) -> None:
        if not self.connected:
            self._leave()
            return
        if self._stream is not None:
            self._send(self._stream, self._stream.take())
        going_on = self._stream is not None and not self.total_outbufs_len  # nothing that waitress would see to
        if self.connected and not going_on:
            super().handle_write()

    def give_up(self) -> None:
        """End the stream, if there is one: the server stops."""
        if self._stream is not None:
            self._send(self._stream, self._stream.give_up(stopping()))

    def handle_close(self) -> None:
        super().handle_close()
        self._leave()
        if (call := self._call_when_gone) is not None:
            self._call_when_gone = None
            call()

    def _leave(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.leave()

    def _send(self, stream: Stream, data: bytes) -> None:
        """Send a part of the stream, and its end where that was the last one."""
        self._largest = max(self._largest, len(data))
        if not stream.ended and self.total_outbufs_len + len(data) > MAX_UNREAD + self._largest:
            data += stream.give_up(too_slow(self.total_outbufs_len + len(data)))
        if data:
            if self._chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if stream.ended and self._chunked:
                data += b"0\r\n\r\n"
            try:
                self._write(data)
            except OSError:
                self.handle_close()
        if stream.ended and self.connected:
            self._stream = None
            with self.requests_lock:
                self.close_when_flushed = True
                for request in self.requests:
                    request.close()
                self.requests = []

    def _write(self, data: bytes) -> None:
        """Into the socket, and what that does not take into the buffer that waitress flushes when it does."""
        if not self.total_outbufs_len:
            data = data[self.send(data) :]
            self.last_activity = time.time()
        if data and self.connected:
            with self.outbuf_lock:
                self.outbufs[-1].append(data)
                self.current_outbuf_count += len(data)
                self.total_outbufs_len += len(data)
