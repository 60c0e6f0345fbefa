"""The engine's end of the line to its front end, a process of its own: what comes is submitted, what is told is sent.

    from the front end   submit number request | cancel number | health number | stats number
    to it                told [[number, deltas] ...] | answered number completions | failed number error
                         health number value | stats number value

One thread hears. Another sends all that a turn of the engine told in one message, so that the engine's own thread
neither writes nor waits. Knows the engine and the line. Does not know HTTP, or how the other process is started.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

from metaseq_api.core import Delta, EngineProtocol, Request
from metaseq_api.core.line import Line
from metaseq_api.core.plain import error_to_plain, from_plain, to_plain
from metaseq_api.core.protocols import Answer
from metaseq_api.errors import MetaseqApiError


class Outlet:
    """`gone` is called once, by the thread that hears, when the front end has gone, for whatever reason."""

    def __init__(self, engine: EngineProtocol, line: Line, gone: Callable[[], None]) -> None:
        self._engine, self._line, self._gone = engine, line, gone
        self._answers: dict[int, tuple[Answer, Request]] = {}
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._noted: set[int] = set()

    def start(self) -> None:
        """Hear and send from now on, in threads of its own."""
        for name, job in (("outlet hears", self._hear), ("outlet tells", self._tell)):
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
            self._line.send(what, number, to_plain(self._engine.health()))
        else:
            assert what == "stats", what
            self._line.send(what, number, to_plain(self._engine.stats))

    def _submit(self, number: int, request: Request) -> None:
        try:
            answer = self._engine.submit(request)
        except MetaseqApiError as e:
            self._line.send("failed", number, error_to_plain(e))
            return
        if request.stream:
            self._line.send("told", [[number, []]])  # it is admitted: the head of the answer may go out
        self._answers[number] = answer, request
        answer.watch(functools.partial(self._note, number))

    # the engine's thread

    def _note(self, number: int) -> None:
        """There is something to take, or the answer has ended."""
        if number not in self._noted:
            self._noted.add(number)
            self._news.put(number)

    # the thread that tells

    def _tell(self) -> None:
        try:
            while True:
                told, ended = self._take(self._noticed())
                if told and not self._line.send("told", told):
                    return
                for message in ended:
                    self._line.send(*message)
        finally:
            self._line.hang_up()  # whatever happened: nobody may wait for an answer that does not come

    def _noticed(self) -> list[int]:
        """Wait for news; of which answers."""
        numbers = [self._news.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                numbers.append(self._news.get_nowait())
        return numbers

    def _take(self, numbers: list[int]) -> tuple[list[Any], list[tuple[Any, ...]]]:
        """What of these answers there is to tell, and how those ended that have."""
        told, endings = [], []
        for number in numbers:
            self._noted.discard(number)  # first: what comes from here on is noted again
            if number not in self._answers:
                continue
            answer, request = self._answers[number]
            has_ended, deltas = answer.ended, []
            try:
                deltas = answer.take() if request.stream else []
                if has_ended:
                    completions = answer.result(0)
                    endings.append(("answered", number, [] if request.stream else to_plain(completions)))
            except MetaseqApiError as e:
                endings.append(("failed", number, error_to_plain(e)))
            if deltas:
                told.append([number, list(map(_plain, deltas))])
            if has_ended:
                del self._answers[number]
        return told, endings


def _plain(delta: Delta) -> list[Any]:
    """As `to_plain`, in a quarter of the time: there is one for every token."""
    reason = None if delta.finish_reason is None else delta.finish_reason.value
    logprobs = None if delta.logprobs is None else to_plain(delta.logprobs)
    return [delta.prompt_index, delta.sample_index, delta.text, delta.num_tokens, reason, logprobs]
