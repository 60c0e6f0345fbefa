"""How the server sees the engine. Nothing here runs; the engine implements it, tests fake it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from metaseq_api.core.completion import Completion, Delta
from metaseq_api.core.request import Request
from metaseq_api.core.stats import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the engine says of itself. `alive` False means: no request will be answered any more.

    rank_age_s: since a rank was last known to live, by rank. stuck: one has not been heard of for too long, or a step
    takes too long; `reason` says which. ready: a request sent now would be begun. step_age_s: how long the running step
    has taken; None where none runs. Units: seconds.
    """

    alive: bool
    reason: str
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    rank_age_s: tuple[float, ...]
    stuck: bool = False
    ready: bool = True
    step_age_s: float | None = None


class Answer(Protocol):
    """The one answer to one admitted Request."""

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Wait for all completions: prompts in order, and for each prompt its n samples in order.

        Units: timeout in seconds. Raises: RequestError, EngineStopped, TimeoutError.
        """
        ...

    @property
    def ended(self) -> bool:
        """Whether it is complete, or failed: what `take` then returns is the last."""
        ...

    @property
    def admitted(self) -> bool:
        """Streamed: whether the engine has taken the request. One that has ended without was refused."""
        ...

    def watch(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when the answer has ended; streamed, also when it is admitted, and at most once a step
        when there is something to take.

        The engine's thread calls it: it must neither block nor fail. It is called at once where something is there.
        """
        ...

    def hand_to(self, hear: Callable[[str], object]) -> None:
        """Streamed: have each *word*, the text of one more token of the only sample, handed to `hear` in the thread
        that makes it, unless something waits to be taken. It must neither block nor fail.
        """
        ...

    def take(self) -> list[Delta]:
        """Streamed: what came since the last call, without waiting; [] where nothing did.

        Raises: as `result`, once everything that came before the failure was taken.
        """
        ...

    def events(self) -> Iterator[Delta]:
        """Streamed: every delta, waiting for each; for one thread that has nothing else to do. Raises: as `result`."""
        ...

    def cancel(self) -> None:
        """Give the request up; its blocks are free within one step. Harmless when it has ended."""
        ...


class EngineProtocol(Protocol):
    """All that the HTTP front end may ask."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_seq_len(self) -> int:
        """Most tokens the model reads: </s>, prompt and completion, but for the last token, which nothing follows."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids a prompt may hold: 0 to vocab_size - 1."""
        ...

    @property
    def stats(self) -> Stats:
        """What it counts of its work."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without </s>; newlines normalised to LF."""
        ...

    def decode(self, token_ids: Seq[int]) -> str: ...

    def submit(self, request: Request) -> Answer:
        """Queue a request. Raises: RequestError (too long, ids out of range), EngineStopped."""
        ...

    def health(self) -> Health: ...
