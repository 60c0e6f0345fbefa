"""waitress around the app: from a bound port to the last answered request.

Knows sockets, threads, limits of a connection and how to stop. Does not know the routes.
One thread reads and writes all sockets, so that a slow or silent client costs a connection and never a thread. It runs
small requests by itself, one after another; what takes longer, or may have to wait, has a thread of a pool. Neither
waits while the engine computes: `channel` says how.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

from metaseq_api.core.address import local_url
from metaseq_api.server.app import AT_ONCE, CLOSING, MAX_BODY
from metaseq_api.server.channel import MAX_HEADER, Channel, going_on
from metaseq_api.server.doorway import keep_out
from metaseq_api.server.later import POLL_S
from metaseq_api.server.port import explain
from metaseq_api.server.sockets import Sockets

CONNECTION_LIMIT = 1024
"""Most open connections; fewer where the process may not open twice as many files."""
IDLE_S = 120
"""Units: seconds after which a connection without a running request is closed."""
LAST_WORDS_S = 1.0
"""Units: seconds that requests given up at the end of the grace get to say so."""
FRESH_S = 1.0
"""Units: seconds that those let in last get to send their request, which is then answered like any other."""
MOST_AT_ONCE = 8 << 10
"""Units: bytes of a body that the thread of all sockets reads by itself: at most some milliseconds of tokenizing."""
FEW_AT_ONCE = 4
"""So many it runs before it looks what else there is: streams go on meanwhile."""
_TICK_S = 0.05


def _connection_limit() -> int:
    """Beyond it clients wait in the kernel's queue; out of descriptors, the accepting thread would spin."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTION_LIMIT if files == resource.RLIM_INFINITY else min(CONNECTION_LIMIT, files // 2)


class Server:
    """One app on one bound socket. `start` serves from a thread of its own, `run` from the caller's; `stop` from any.

    Raises: PortInUse where another program began to listen on the socket's port first.
    """

    def __init__(self, app: Flask, sock: socket.socket, *, threads: int | None = None) -> None:
        self._sock = sock
        self._closing: threading.Event = app.extensions[CLOSING]
        host, port = sock.getsockname()[:2]
        try:
            self._waitress = create_server(
                going_on(app),
                sockets=[sock],
                threads=threads or _connection_limit(),  # one for each: no request waits for a thread, unseen by limits
                ident="metaseq-api",
                asyncore_use_poll=True,
                backlog=CONNECTION_LIMIT,
                channel_request_lookahead=1,  # keeps reading while a request runs, and so sees its client go
                channel_timeout=IDLE_S,
                clear_untrusted_proxy_headers=True,
                connection_limit=_connection_limit(),
                log_socket_errors=False,
                max_request_body_size=2 * MAX_BODY,  # up to here it is read, so that the app's 413 surely arrives
                max_request_header_size=MAX_HEADER,
            )
        except OSError as e:
            sock.close()
            raise explain(e, host, port) from None
        self._ready: deque[Channel] = deque()
        self._asked: deque[Channel] = deque()
        self._at_once: frozenset[str] = app.extensions[AT_ONCE]
        self._put_off: set[Channel] = set()
        self._look_at = 0.0
        self._awake = False
        self._waitress.channel_class = Channel
        self._waitress.wake = self._wake
        self._waitress.add_task = self._ask
        self._waitress.run_soon = self._run_soon
        self._waitress.put_off = self._put_off
        self._waitress.pull_trigger = self._rouse
        self._waitress.maintenance = self._close_silent
        self._waitress.sockets = self._sockets = Sockets(self._waitress._map)
        self._waitress.hanging_up = False
        for one in self._waitress._map.values():
            self._sockets.look_at(one)
        self._trigger_lock = threading.RLock()  # a signal handler may stop the thread that holds it
        self._stop_at: float | None = None
        self._runner: threading.Thread | None = None
        self._ended = threading.Event()
        self.host, self.port = str(host), int(port)
        self.url = local_url(sock)

    def start(self) -> None:
        """Serve from a thread of its own."""
        self._runner = threading.Thread(target=self.run, name="http", daemon=True)
        self._runner.start()

    def run(self) -> None:
        """Serve until `stop`, then let running requests finish within its grace."""
        if self._ended.is_set():
            return
        self._runner = threading.current_thread()
        try:
            while self._stop_at is None:
                self._poll(1.0)
            self._drain()
        finally:
            self._close()

    def hang_up(self) -> None:
        """Go on as before, but have every answer end its connection: whoever asks again comes by a new one."""
        self._waitress.hanging_up = True

    def stop(self, grace_s: float = 10.0) -> None:
        """Accept nothing new; end when the running requests have, at most `grace_s` later: those left over get a 503.

        Whoever was let in is answered, if the request comes within FRESH_S; whoever comes later is refused.
        Returns when `run` has ended; at once when called, by a signal handler say, in the thread that runs it.
        A second call can only shorten the first's grace.
        """
        stop_at = time.monotonic() + grace_s
        self._stop_at = stop_at if self._stop_at is None else min(self._stop_at, stop_at)
        if self._runner is None:
            self._close()
        elif not self._ended.is_set():
            self._pull_trigger()
            if self._runner is not threading.current_thread():
                self._ended.wait()

    def attend(self, fd: int, hear: Callable[[], bool]) -> None:
        """Have the thread of all sockets call `hear` when there is something to read, until that returns False.

        What `hear` wakes is fed when it returns, all in one go. What it raises is logged, and it is called no more;
        what is to become of the server then is for `hear` to say. Before `run`.
        """
        self._sockets.attend(fd, hear)

    # the thread of all sockets

    def _poll(self, timeout_s: float) -> None:
        self._feed()
        self._look_after(time.monotonic())
        self._sockets.look_at(self._waitress)  # which may have let in as many as it may
        if self._put_off:
            timeout_s = min(timeout_s, POLL_S)
        happened = self._sockets.wait(0 if self._ready or self._asked else timeout_s)
        self._awake = True
        for one, flags in happened:
            wasyncore.readwrite(one, flags)
            self._sockets.look_at(one)
        self._awake = False  # before, not after: whoever comes while these are fed pulls the trigger again
        self._feed()

    def _feed(self) -> None:
        for _ in range(FEW_AT_ONCE):
            while self._ready:
                channel = self._ready.popleft()
                wasyncore.write(channel)  # what fails in one costs that connection, as with any other event
                if channel.changed:
                    self._sockets.look_at(channel)
            if not self._asked:
                break
            channel = self._asked.popleft()
            channel.asked = True
            self._ready.append(channel)

    def _look_after(self, now: float) -> None:
        """Whether those whose answer is not there yet are still waited for."""
        if self._put_off and now >= self._look_at:
            self._look_at = now + POLL_S
            self._ready.extend(self._put_off.copy())

    def _close_silent(self, now: float) -> None:
        type(self._waitress).maintenance(self._waitress, now)
        self._ready.extend(self._waitress.active_channels.values())

    # any thread

    def _wake(self, channel: Channel) -> None:
        """Have a channel fed, and asked what it waits for, soon. Any thread, at any time, also when this has ended."""
        self._ready.append(channel)
        if not self._awake:
            self._rouse()

    def _ask(self, channel: Channel) -> None:
        """Have the next request of a channel run: here where that takes no time, else by a thread of the pool."""
        if _takes_no_time(channel.requests[0], self._at_once) and not channel.total_outbufs_len:
            self._run_soon(channel)
        else:
            self._waitress.task_dispatcher.add_task(channel)

    def _run_soon(self, channel: Channel) -> None:
        """Have the thread of all sockets run a request. Nothing unsent may lie before its answer: it would wait."""
        self._asked.append(channel)
        if not self._awake:
            self._rouse()

    def _rouse(self) -> None:
        if not self._awake:
            self._awake = True
            self._pull_trigger()

    def _pull_trigger(self) -> None:
        """Have the thread of all sockets look up from its wait."""
        with self._trigger_lock:  # behind a closed trigger's descriptor there may be another file by now
            if not self._ended.is_set():
                self._waitress.trigger.pull_trigger()

    def _drain(self) -> None:
        self.hang_up()
        self._stop_listening()
        fresh = time.monotonic() + FRESH_S
        self._poll(0)  # what has come already is a request, not silence
        while self._close_idle(fresh) and time.monotonic() < (self._stop_at or 0):
            self._poll(_TICK_S)
        self._closing.set()
        last = max(time.monotonic() + LAST_WORDS_S, fresh)
        while self._close_idle(fresh) and time.monotonic() < last:
            for channel in list(self._waitress.active_channels.values()):
                channel.give_up()
            self._poll(_TICK_S)

    def _stop_listening(self) -> None:
        """Refuse new connections, none of them half way. The trigger stays: threads need it to send their answers."""
        if not self._waitress.accepting:
            return
        keep_out(self._sock)
        waiting = select.poll()
        waiting.register(self._sock, select.POLLIN)
        for _ in range(2 * CONNECTION_LIMIT):
            if not waiting.poll(0):
                break
            self._waitress.handle_accept()  # the kernel has answered them: closing would break them off
        self._waitress.accepting = False
        self._sockets.forget(self._waitress)
        with contextlib.suppress(OSError):  # closed before
            self._sock.shutdown(socket.SHUT_RDWR)  # also where another process holds the socket too
        wasyncore.dispatcher.close(self._waitress)

    def _close_idle(self, fresh: float) -> bool:
        """Close connections where no request runs and no answer is on its way; whether others are left.

        One that never brought a request, or has brought half of one, is let be until `fresh`.
        """
        for channel in list(self._waitress.active_channels.values()):
            if channel.requests or channel.total_outbufs_len:
                continue
            if (channel.served and channel.request is None) or time.monotonic() > fresh:
                channel.handle_close()
        return bool(self._waitress.active_channels)

    def _close(self) -> None:
        if self._ended.is_set():
            return
        try:
            self._closing.set()
            self._stop_listening()
            for channel in list(self._waitress.active_channels.values()):
                channel.handle_close()  # its request, if one runs, finds the client gone
            self._waitress.task_dispatcher.shutdown(timeout=LAST_WORDS_S)
            for channel in self._put_off.copy():  # by a thread that ran until now
                channel.take_up()
        finally:
            with self._trigger_lock:
                self._ended.set()
                self._waitress.trigger.close()
                self._sockets.close()


def _takes_no_time(request: Any, paths: frozenset[str]) -> bool:
    """Whether a parsed request is small, and of a path whose view waits for nothing."""
    if request.error is not None or request.chunked:
        return False
    return request.path in paths and request.content_length <= MOST_AT_ONCE
