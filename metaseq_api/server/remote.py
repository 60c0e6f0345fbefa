"""The engine as its front end sees it from a process of its own, at the other end of a line (`engine.outlet`).

Implements core.protocols.EngineProtocol. Texts become tokens here, by a tokenizer of this process. Knows what is said
on the line. Does not know routes, or the engine.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from metaseq_api.core import Completion, Delta, FinishReason, Health, Request, Stats, TokenLogprobs
from metaseq_api.core.line import Line
from metaseq_api.core.pending import PendingAnswer
from metaseq_api.core.plain import error_from_plain, from_plain
from metaseq_api.errors import EngineStopped, NotBegun

ASK_S = 5.0
"""Units: seconds in which the engine's process says how it is, whatever its engine computes; else it is stuck.

Where three services shared two cores, one answer in 453 took 2.5 (2026-11-28).
"""
_new = tuple.__new__  # a quarter of what the class takes
_GONE = "the engine has ended; ask again elsewhere or later"


class Coder(Protocol):
    """A tokenizer, as much of it as is needed here."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Seq[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What never changes of an engine; as in EngineProtocol."""

    model_name: str
    max_seq_len: int
    vocab_size: int


class RemoteAnswer(PendingAnswer):
    """Implements core.protocols.Answer."""

    def __init__(self, on_cancel: Callable[[], object]) -> None:
        super().__init__()
        self._on_cancel = on_cancel
        self.admitted = False
        self.parts: list[Any] = []
        """The completions as they came: large ones are read by the thread that waits for them."""

    def cancel(self) -> None:
        if not self.ended:
            self._on_cancel()

    def result(self, timeout: float | None = None) -> list[Completion]:
        super().result(timeout)
        return from_plain(list[Completion], self.parts)

    def add_word(self, text: str) -> None:
        """One more token of the only sample; as `push` and `notify`."""
        self._deltas.append(_new(Delta, (0, 0, text, 1, None, None)))
        if self._wake is not None:
            self._wake()


class RemoteEngine:
    """Asks over `line`; whoever receives there has each message about the engine handled (`hear`, `lose`)."""

    def __init__(self, line: Line, facts: Facts, coder: Coder) -> None:
        self._line, self._facts = line, facts
        self.encode, self.decode = coder.encode, coder.decode
        self._numbers = itertools.count()
        self._answers: dict[int, RemoteAnswer] = {}
        self._questions: dict[int, queue.SimpleQueue[Any]] = {}
        self._lock = threading.Lock()
        self._lost = False

    @property
    def model_name(self) -> str:
        return self._facts.model_name

    @property
    def max_seq_len(self) -> int:
        return self._facts.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self._facts.vocab_size

    def submit(self, request: Request) -> RemoteAnswer:
        """Raises: NotBegun. What else the engine refuses it for, the answer says: one that ends without having been
        admitted, where it is a stream.
        """
        number = next(self._numbers)
        answer = RemoteAnswer(lambda: self._line.send("cancel", number))
        with self._lock:
            if self._lost:
                raise NotBegun(_GONE)
            self._answers[number] = answer
        self._line.send("submit", number, request)
        return answer

    def health(self) -> Health:
        plain = self._ask("health")
        if plain is None:
            return _unknown(alive=not self._lost)
        return from_plain(Health, plain)

    @property
    def stats(self) -> Stats:
        """Raises: EngineStopped where the engine's process does not answer."""
        plain = self._ask("stats")
        if plain is None:
            raise EngineStopped("the engine's process does not answer; its counts are not known")
        return from_plain(Stats, plain)

    # what whoever receives calls

    def hear(self, what: str, *of: Any) -> None:
        """Handle one message."""
        if what == "words":
            for number, text in zip(*of, strict=True):
                self._answers[number].add_word(text)
            return
        if what == "told":
            for number, deltas in of[0]:
                self._tell(number, deltas)
            return
        number, said = of
        if what in ("health", "stats"):
            if (question := self._questions.get(number)) is not None:
                question.put(said)
            return
        if what == "part":
            self._answers[number].parts.append(said)
            return
        with self._lock:
            answer = self._answers.pop(number)
        if what == "answered":
            answer.end([])
            answer.notify()
        else:
            assert what == "failed", what
            answer.fail(error_from_plain(said))

    def lose(self) -> None:
        """The other side has gone: nobody waits any longer."""
        with self._lock:
            self._lost = True
            answers = list(self._answers.values())
            self._answers.clear()
        for answer in answers:
            answer.fail(EngineStopped(_GONE))

    def _tell(self, number: int, deltas: list[Any]) -> None:
        answer = self._answers[number]
        for plain in deltas:
            answer.push(_delta(*plain))
        answer.admitted = True
        answer.notify()

    def _ask(self, what: str) -> Any:
        """What the other side says of itself; None where it says nothing in time."""
        number, said = next(self._numbers), queue.SimpleQueue[Any]()
        self._questions[number] = said
        try:
            if self._lost:
                return None
            self._line.send(what, number)
            return said.get(timeout=ASK_S)
        except queue.Empty:
            return None
        finally:
            del self._questions[number]


def _delta(prompt: int, sample: int, text: str, num_tokens: int, reason: str | None, logprobs: Any) -> Delta:
    """One as it came; there is one for every token."""
    return Delta(
        prompt,
        sample,
        text,
        num_tokens,
        None if reason is None else FinishReason(reason),
        None if logprobs is None else from_plain(TokenLogprobs, logprobs),
    )


def _unknown(*, alive: bool) -> Health:
    return Health(
        alive=alive,
        reason=f"the engine's process (rank 0) gave no sign of life for {ASK_S:.0f} s" if alive else _GONE,
        num_running=0,
        num_waiting=0,
        num_free_blocks=0,
        num_blocks=0,
        rank_age_s=(),
        stuck=alive,
        ready=False,
    )
