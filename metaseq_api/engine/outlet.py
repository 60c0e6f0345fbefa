"""The engine's end of the line to its front end, a process of its own: what comes is submitted, what is told is sent.

    from the front end   submit number request | cancel number | health number | stats number
    to it                words [number ...] [text ...] | told [[number, deltas] ...] | part number completion
                         answered number | failed number error | health number value | stats number value

A word is what nearly every delta is: the text of one more token of a request's only sample.

One thread hears. What the engine told is written down by the engine's own thread, many tokens at a time, for two
threads that compute in Python hold each other up; only what is large is left to the line's thread.
Knows the engine and the line. Does not know HTTP, or how the other process is started.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from metaseq_api.core import Completion, Delta, EngineProtocol, Request
from metaseq_api.core.line import Line, Message, written
from metaseq_api.core.plain import error_to_plain, from_plain
from metaseq_api.core.protocols import Answer
from metaseq_api.errors import MetaseqApiError

FEW = 16
"""Scored tokens that are written down at once; more of them, an echoed prompt's, by the line's thread."""


class Engine(EngineProtocol, Protocol):
    """What more is asked of it."""

    def after_turn(self, call: Callable[[], None]) -> None:
        """Have its thread call this whenever whoever streams was woken, and at the end of all."""
        ...


class Outlet:
    """`gone` is called once, by the thread that hears, when the front end has gone, for whatever reason."""

    def __init__(self, engine: Engine, line: Line, gone: Callable[[], None]) -> None:
        self._engine, self._line, self._gone = engine, line, gone
        self._answers: dict[int, tuple[Answer, Request]] = {}
        self._words: deque[tuple[int, str]] = deque()
        self._noted: deque[int] = deque()
        self._telling = threading.Lock()

    def start(self) -> None:
        """Hear from now on, in a thread of its own."""
        self._engine.after_turn(self._tell)
        threading.Thread(target=self._hear, name="outlet hears", daemon=True).start()

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
            if (held := self._answers.get(number)) is not None:
                held[0].cancel()
        elif what == "health":
            self._line.send(what, number, self._engine.health())
        else:
            assert what == "stats", what
            self._line.send(what, number, self._engine.stats)

    def _submit(self, number: int, request: Request) -> None:
        try:
            answer = self._engine.submit(request)
        except MetaseqApiError as e:
            self._line.send("failed", number, error_to_plain(e))
            return
        if request.stream:
            self._line.send("told", [[number, []]])  # it is admitted: the head of the answer may go out
        self._answers[number] = answer, request
        answer.hand_to(functools.partial(self._add_word, number))
        answer.watch(functools.partial(self._noted.append, number))  # there is something to take, or it has ended
        if self._noted:  # already, and the engine may have nothing to do
            self._tell()

    # the engine's thread

    def _add_word(self, number: int, text: str) -> None:
        self._words.append((number, text))

    def _tell(self) -> None:
        """Write down what there is to tell."""
        with self._telling:
            # in this order: of an answer that was noted all words are there, and no more come while others wait
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            words = [self._words.popleft() for _ in range(len(self._words))]
            if words:
                self._line.send("words", *zip(*words, strict=True))
            told: list[Any] = []
            rest = [message for number in dict.fromkeys(noted) for message in self._take(number, told)]
            if told:
                self._line.send("told", told)
            for message in rest:
                self._line.put(message)

    def _take(self, number: int, told: list[Any]) -> list[Message]:
        """Add to `told` what of this answer there is; what is to be said after that: much at once, and how it ended."""
        if number not in self._answers:
            return []
        answer, request = self._answers[number]
        has_ended, deltas, rest = answer.ended, [], list[Message]()
        try:
            deltas = answer.take() if request.stream else []
            if has_ended:
                parts = [] if request.stream else [_part(number, c) for c in answer.result(0)]
                rest = [*parts, written("answered", number, None)]
        except MetaseqApiError as e:
            rest = [written("failed", number, error_to_plain(e))]
        if rest:
            del self._answers[number]
        if request.params.logprobs is not None and _is_much(deltas):
            return [lambda: written("told", [[number, deltas]]), *rest]
        if deltas:
            told.append([number, deltas])
        return rest


def _part(number: int, completion: Completion) -> Message:
    """One completion. With scores it may have a hundred thousand numbers, and is not written by the engine's thread."""
    part = functools.partial(written, "part", number, completion)
    return part() if completion.logprobs is None and completion.prompt_logprobs is None else part


def _is_much(deltas: list[Delta]) -> bool:
    return any(d.logprobs is not None and len(d.logprobs.tokens) > FEW for d in deltas)
