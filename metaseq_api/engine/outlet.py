"""The engine's end of the line to its front end, a process of its own: what comes is submitted, what is told is sent.

    from the front end   submit number request | cancel number | health number | stats number
    to it                told [[number, deltas] ...] | answered number completions | failed number error
                         health number value | stats number value

One thread hears. What a turn of the engine told is written down by the engine's own thread at the end of the turn, in
one message, for two threads that compute in Python hold each other up; another thread sends it, which may have to wait.
Knows the engine and the line. Does not know HTTP, or how the other process is started.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from metaseq_api.core import Delta, EngineProtocol, Request
from metaseq_api.core.line import Line, written
from metaseq_api.core.plain import error_to_plain, from_plain, to_plain
from metaseq_api.core.protocols import Answer
from metaseq_api.errors import MetaseqApiError


class Engine(EngineProtocol, Protocol):
    """What more is asked of it."""

    def after_turn(self, call: Callable[[], None]) -> None:
        """Have its thread call this at the end of each turn, and of all."""
        ...


class Outlet:
    """`gone` is called once, by the thread that hears, when the front end has gone, for whatever reason."""

    def __init__(self, engine: Engine, line: Line, gone: Callable[[], None]) -> None:
        self._engine, self._line, self._gone = engine, line, gone
        self._answers: dict[int, tuple[Answer, Request]] = {}
        self._noted: deque[int] = deque()
        self._telling = threading.Lock()
        self._out: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self) -> None:
        """Hear and send from now on, in threads of its own."""
        self._engine.after_turn(self._tell)
        for name, job in (("outlet hears", self._hear), ("outlet sends", self._send)):
            threading.Thread(target=job, name=name, daemon=True).start()

    # the thread that hears

    def _hear(self) -> None:
        try:
            for what, number, *of in self._line.messages():
                self._handle(what, number, *of)
        finally:
            for answer, _ in list(self._answers.values()):
                answer.cancel()
            self._gone()

    def _handle(self, what: str, number: int, request: Any = None) -> None:
        if what == "submit":
            self._submit(number, from_plain(Request, request))
        elif what == "cancel":
            if number in self._answers:
                self._answers[number][0].cancel()
        elif what == "health":
            self._out.put(written(what, number, to_plain(self._engine.health())))
        else:
            assert what == "stats", what
            self._out.put(written(what, number, to_plain(self._engine.stats)))

    def _submit(self, number: int, request: Request) -> None:
        try:
            answer = self._engine.submit(request)
        except MetaseqApiError as e:
            self._out.put(written("failed", number, error_to_plain(e)))
            return
        if request.stream:
            self._out.put(written("told", [[number, []]]))  # it is admitted: the head of the answer may go out
        self._answers[number] = answer, request
        answer.watch(lambda: self._noted.append(number))  # there is something to take, or it has ended
        if self._noted:  # already, and the engine may have nothing to do
            self._tell()

    # the engine's thread

    def _tell(self) -> None:
        """Write down what there is to tell."""
        with self._telling:
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            if not noted:
                return
            told: list[Any] = []
            endings = [
                written(*end) for number in dict.fromkeys(noted) if (end := self._take(number, told)) is not None
            ]
            self._out.put(b"".join([written("told", told), *endings] if told else endings))

    def _take(self, number: int, told: list[Any]) -> tuple[Any, ...] | None:
        """Add to `told` what of this answer there is, and give how it ended if it has."""
        if number not in self._answers:
            return None
        answer, request = self._answers[number]
        has_ended, deltas, end = answer.ended, [], None
        try:
            deltas = answer.take() if request.stream else []
            if has_ended:
                completions = answer.result(0)
                end = "answered", number, [] if request.stream else to_plain(completions)
        except MetaseqApiError as e:
            end = "failed", number, error_to_plain(e)
        if deltas:
            told.append([number, [_plain(delta) for delta in deltas]])
        if has_ended:
            del self._answers[number]
        return end

    # the thread that sends

    def _send(self) -> None:
        try:
            while self._line.write(self._waiting()):
                pass
        finally:
            self._line.hang_up()  # whatever happened: nobody may wait for an answer that does not come

    def _waiting(self) -> bytes:
        """Wait for something to send; all there is."""
        data = [self._out.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                data.append(self._out.get_nowait())
        return b"".join(data)


def _plain(delta: Delta) -> list[Any]:
    """As `to_plain`, in a quarter of the time: there is one for every token."""
    reason = None if delta.finish_reason is None else delta.finish_reason.value
    logprobs = None if delta.logprobs is None else to_plain(delta.logprobs)
    return [delta.prompt_index, delta.sample_index, delta.text, delta.num_tokens, reason, logprobs]
