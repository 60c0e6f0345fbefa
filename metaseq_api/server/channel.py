"""One connection under waitress: what it refuses by itself in JSON, word of a client that left, and answers that no
thread waits for.

A request whose answer is not there yet is put off (`later`), and taken up again when it has come. From the head of a
streamed answer on the one thread that has all sockets renders and sends what has come, for all streams in one go after
each step of the engine: a thread for each would wake hundreds of times a step, to be in the way of the thread that
computes.

Knows waitress's channels and tasks. Does not know the app, or what a stream says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask

from metaseq_api.errors import PayloadTooLarge, RequestError
from metaseq_api.server.app import MAX_BODY
from metaseq_api.server.asker import TAKE_OVER
from metaseq_api.server.later import PUT_OFF, Later
from metaseq_api.server.schema import render_error
from metaseq_api.server.stream import Stream, stopping, too_slow

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
"""As WSGI has it."""
MAX_HEADER = 64 << 10
"""Units: bytes."""
MAX_UNREAD = 1 << 20
"""Units: bytes of a stream, beyond what the kernel holds, that its client has not read; with more it is ended.

One part may be larger by itself (an echoed prompt with its scores), and is then allowed besides.
"""


class _TakenOver(BaseException):
    """Not an error: leaves HTTPChannel.service before it would end the request, which goes on."""


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


class Task(WSGITask):  # type: ignore[misc]
    """A request whose app may put the answer off, and then this runs once more, or hand over a stream."""

    stream: Stream | None = None
    later: Later | None = None
    wrote_header: bool

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[PUT_OFF] = self._put_off
        environ[TAKE_OVER] = self._take_over
        return environ

    def build_response_header(self) -> bytes:
        if self.channel.server.hanging_up:
            self.set_close_on_finish()
        head: bytes = super().build_response_header()
        return head

    def _put_off(self, later: Later) -> None:
        self.later = later

    def answered(self) -> Application:
        """What its answer has become; asked for once, and what it was made of is free then."""
        later, self.later = self.later, None
        assert later is not None
        return later.response()

    def _take_over(self, stream: Stream) -> None:
        self.stream = stream

    def write(self, data: bytes) -> None:
        if self.wrote_header or not data or self.content_length != len(data) or not self.has_body:
            super().write(data)
            return
        self.channel.write_soon(self.build_response_header() + data)  # in one piece: it wakes the client once
        self.wrote_header, self.content_bytes_written = True, len(data)

    def finish(self) -> None:
        if self.later is not None and not self.complete:
            self.channel.put_off(self, self.later)
            raise _TakenOver
        if self.stream is None:
            super().finish()
            return
        try:
            self.write(b"")  # the head
        finally:  # also where the client has left already: the stream is told by the thread that has it
            self.channel.begin(self.stream, chunked=self.chunked_response)
        raise _TakenOver


def going_on(app: Application) -> Application:
    """The app as tasks call it: for one that was put off, what that has become."""

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        task: Task = environ[PUT_OFF].__self__
        return (app if task.later is None else task.answered())(environ, start_response)

    return call


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection.

    The server it belongs to has `wake`, by which the thread of all sockets feeds it, `sockets`, that wait for it,
    `hanging_up`: whether an answer is to end its connection, `put_off`: the channels with a request that is, and
    `run_soon`, by which that thread runs a request itself.
    """

    error_task_class = _JsonErrorTask
    requests: list[Any]
    served = False
    """Whether it ever brought a request."""
    changed = True
    """Whether it may wait for something else than before it was last fed."""
    asked = False
    """Whether the thread of all sockets is to run its request."""
    _put_off: Task | None = None
    _taken_up: Task | None = None
    _stream: Stream | None = None
    _chunked = _begun = False
    _largest = 0

    # what the thread of a request calls

    def service(self) -> None:
        self.served = True
        taken_up = self._taken_up
        with contextlib.suppress(_TakenOver):
            try:
                super().service()
            finally:
                self.server.wake(self)  # to be read, or closed, or flushed
                if taken_up is not None and taken_up.later is not None:  # its client left just now
                    taken_up.answered()

    def _flush_outbufs_below_high_watermark(self) -> None:
        if self.total_outbufs_len:  # it may wait until that is sent
            self.server.wake(self)
        super()._flush_outbufs_below_high_watermark()

    def send(self, data: bytes, do_close: bool = True) -> int:
        here = threading.get_ident() == self._home
        num: int = super().send(data, do_close and here)  # only the thread that has all sockets may close one
        return num

    def task_class(self, _: Channel, request: Any) -> Task:
        """What `service` runs: a new task, or the one that was put off."""
        task, self._taken_up = self._taken_up, None
        return task or Task(self, request)

    def put_off(self, task: Task, later: Later) -> None:
        """Leave a request to the thread of all sockets, which takes it up again when its answer has come."""
        self.server.put_off.add(self)
        self._put_off = task
        wake = functools.partial(self.server.wake, self)
        later.watch(wake)
        wake()

    def begin(self, stream: Stream, *, chunked: bool) -> None:
        """Leave a stream, the head of which was written, to the thread of all sockets."""
        self._chunked, self._stream, self._begun = chunked, stream, False
        wake = functools.partial(self.server.wake, self)
        stream.watch(wake)
        wake()

    # what the thread of all sockets calls

    def add_channel(self, map: dict[int, Any] | None = None) -> None:
        super().add_channel(map)
        self._home = threading.get_ident()
        self.server.wake(self)

    def del_channel(self, map: dict[int, Any] | None = None) -> None:
        self.server.sockets.forget(self)
        super().del_channel(map)

    def handle_write_event(self) -> None:
        """Run what was asked, send what its stream has by now, and what there is besides."""
        if self.asked:
            self.asked = False
            self.service()
        self.take_up()
        stream, self.changed = self._stream, True
        if not self.connected:
            self._leave()
            return
        if stream is not None:
            self.changed = self._send(stream, stream.take()) or not self._begun
            self._begun = True
        if self.changed and self.writable():
            self.handle_write()

    def take_up(self) -> None:
        """Go on with a request that was put off, if it is due."""
        task = self._put_off
        if task is None or task.later is None or not task.later.is_due():
            return
        self._put_off = None
        self.server.put_off.discard(self)
        if not self.connected:
            task.answered()  # for nobody; but the log and the limits of its key want to know
            return
        self._taken_up = task
        if task.later.is_small and not self.total_outbufs_len:
            self.server.run_soon(self)
        else:
            self.server.task_dispatcher.add_task(self)

    def give_up(self) -> None:
        """End what runs here, if something does: the server stops."""
        self.take_up()
        if self._stream is not None:
            self._send(self._stream, self._stream.give_up(stopping()))
            self.server.wake(self)

    def handle_close(self) -> None:
        super().handle_close()
        self.take_up()
        self._leave()

    def _leave(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.leave()

    def _send(self, stream: Stream, data: bytes) -> bool:
        """Send a part of the stream, and its end where that was the last one; whether all went as it usually does not.

        What the socket does not take goes into the buffer that waitress flushes when it does.
        """
        waiting = self.total_outbufs_len
        if len(data) > self._largest:
            self._largest = len(data)
        if waiting and not stream.ended and waiting + len(data) > MAX_UNREAD + self._largest:
            data += stream.give_up(too_slow(waiting + len(data)))
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if stream.ended and self._chunked:
            data += b"0\r\n\r\n"
        if data and not waiting:
            data = data[self._send_now(data) :]
        if data and self.connected:
            with self.outbuf_lock:
                self.outbufs[-1].append(data)
                self.current_outbuf_count += len(data)
                self.total_outbufs_len += len(data)
        if stream.ended and self.connected:
            self._end()
        return stream.ended or bool(data) or waiting > 0

    def _send_now(self, data: bytes) -> int:
        try:
            return self.socket.send(data)  # type: ignore[no-any-return]
        except BlockingIOError:
            return 0
        except OSError:  # it has gone
            self.handle_close()
            return len(data)

    def _end(self) -> None:
        """The stream has ended, and with it this connection, once all is sent."""
        self._stream = None
        self.last_activity = time.time()
        with self.requests_lock:
            self.close_when_flushed = True
            for request in self.requests:
                request.close()
            self.requests = []
