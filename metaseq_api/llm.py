"""A model in Python's hands, for notebooks and scripts:

    from metaseq_api import LLM, SamplingParams
    with LLM("/data/opt/1.3b") as llm:
        print(llm.generate("Paris is", SamplingParams(max_tokens=8, temperature=0))[0].text)

Any number of threads may call at once; their prompts share the model's steps. Nothing is printed and no signal is
handled here: Ctrl-C, and a notebook's stop button, give up what was asked and leave the model ready.

Knows prompts, lists of them and their results. Does not know how the model came to run; `resident` does.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from metaseq_api import settings
from metaseq_api.core import Answer, Completion, Delta, Request, SamplingParams
from metaseq_api.core.generation import Generation, Score
from metaseq_api.core.request import MAX_N
from metaseq_api.errors import EngineStopped, RequestError
from metaseq_api.resident import Resident

Prompt = str | Seq[int]
"""A text, or token ids."""
Params = SamplingParams | Seq[SamplingParams] | None
MAX_PENDING = 1024
"""Sequences of one call that are in work or waiting; a longer list goes in bit by bit."""
MAX_QUEUE = 1 << 20
"""Callers here are not strangers: they wait instead of being refused."""
_SCORING = SamplingParams(max_tokens=0, echo=True, logprobs=0)
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


class LLM:
    """A checkpoint, loaded and ready: raw FSDP shards, model parts, or a Hugging Face folder; None is the demo model.

    model_parallel: ranks the model is split over, each a process (the first is this one); None: every visible GPU.
    dtype: fp32, fp16 or bf16; None: as stored on a GPU, fp32 on a CPU. device: cuda or cpu; None: cuda where there is
    a GPU. The other words mean what they mean in Settings. Raises: MetaseqApiError.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        model_parallel: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        max_seq_len: int | None = None,
        bpe_vocab: str | os.PathLike[str] | None = None,
        bpe_merges: str | os.PathLike[str] | None = None,
        max_batch_tokens: int | None = None,
        max_batch_size: int | None = None,
        max_beam: int | None = None,
        block_size: int | None = None,
        cache_tokens: int | None = None,
        threads: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        words = {name: value for name, value in locals().items() if name != "self" and value is not None}
        self._resident = Resident(settings.given({"max_beam": MAX_N, "max_queue": MAX_QUEUE, **words}))
        # also when this object is collected, and when Python ends
        self._closer = weakref.finalize(self, self._resident.close)

    def close(self) -> None:
        """Give the memory back and end the other ranks. Harmless when it is closed."""
        self._closer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def model_name(self) -> str:
        return self._resident.engine.model_name

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and completion together, the leading </s> included."""
        return self._resident.engine.max_seq_len

    @property
    def vocab_size(self) -> int:
        """Ids go from 0 to vocab_size - 1."""
        return self._resident.engine.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without </s>."""
        return self._resident.engine.encode(text)

    def decode(self, token_ids: Seq[int]) -> str:
        """The text of token ids."""
        return self._resident.engine.decode([operator.index(t) for t in token_ids])

    def generate(self, prompts: Prompt | Seq[Prompt], params: Params = None) -> list[Generation]:
        """Continue each prompt, all in one batch; results in the prompts' order. `params` is for all, or a list.

        A seed makes a prompt's text its own: the same alone and among others. Raises: RequestError naming what is
        wrong, RankFailed, EngineStopped.
        """
        every = _prompts(prompts)
        chosen = _params(params, len(every))
        answers = self._ask(self._request(x, p) for x, p in zip(every, chosen, strict=True))
        shown = (x if isinstance(x, str) else _ids(x) for x in every)
        return [Generation(prompt=x, completions=tuple(a)) for x, a in zip(shown, answers, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The continuation in pieces, each as soon as it is final; to stop reading is to stop generating.

        Raises: as `generate`, when called or while it is read.
        """
        if params is not None and params.n != 1:
            raise RequestError(f"n is {params.n}; one text is streamed here, deltas() streams several", param="n")
        deltas = self.deltas(prompt, params)
        return (delta.text for delta in deltas if delta.text)

    def deltas(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """All that is known of each piece of all n continuations, which one it belongs to included."""
        (chosen,) = _params(params, 1)
        with self._honest():
            answer = self._resident.engine.submit(self._request(prompt, chosen, stream=True))
        return self._read(answer)

    def score(self, texts: Prompt | Seq[Prompt]) -> list[Score]:
        """How likely the model holds each text, token by token: natural log-probabilities, at temperature 1."""
        scores = []
        for (c,) in self._ask(self._request(x, _SCORING) for x in _prompts(texts)):
            assert c.logprobs is not None
            scores.append(
                Score(tokens=c.logprobs.tokens, token_ids=c.token_ids, token_logprobs=c.logprobs.token_logprobs)
            )
        return scores

    def _request(self, prompt: Prompt, params: SamplingParams, *, stream: bool = False) -> Request:
        ids = tuple(self._resident.engine.encode(prompt)) if isinstance(prompt, str) else _ids(prompt)
        return Request(request_id=f"llm-{uuid.uuid4().hex}", prompts=(ids,), params=params, stream=stream)

    def _ask(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """Submit all, wait for all; whatever ends the waiting gives up the rest."""
        pending: deque[Answer] = deque()
        done: list[list[Completion]] = []
        with self._honest():
            engine = self._resident.engine
            try:
                for request in requests:
                    pending.append(engine.submit(request))
                    if len(pending) * request.params.num_samples >= MAX_PENDING:
                        done.append(pending[0].result())
                        pending.popleft()
                while pending:
                    done.append(pending[0].result())
                    pending.popleft()
            except BaseException:
                for answer in pending:
                    answer.cancel()
                raise
        return done

    def _read(self, answer: Answer) -> Iterator[Delta]:
        try:
            with self._honest():
                yield from answer.events()
        finally:
            answer.cancel()

    @contextmanager
    def _honest(self) -> Iterator[None]:
        """Where the engine failed, say why. Raises: RankFailed."""
        try:
            yield
        except EngineStopped:
            if error := self._resident.why():
                raise error from None
            raise


def _prompts(given: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or several; a list of numbers is one. Raises: RequestError."""
    if isinstance(given, (str, bytes)):
        return [given]
    every: list[Any] = list(given)
    return [every] if every and _is_id(every[0]) else every


def _is_id(x: Any) -> bool:
    try:
        operator.index(x)
    except TypeError:
        return False
    return True


def _ids(prompt: Any) -> tuple[int, ...]:
    listed = isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, dict))
    if not listed or not all(map(_is_id, prompt)):
        shown = f"{prompt!r}"[:60]
        raise RequestError(f"a prompt is {shown}; it must be a text or a list of token ids", param="prompt")
    return tuple(map(operator.index, prompt))


def _params(given: Params, num: int) -> list[SamplingParams]:
    """One for each prompt. Raises: RequestError."""
    every = [given or SamplingParams()] * num if given is None or isinstance(given, SamplingParams) else list(given)
    if len(every) != num:
        raise RequestError(f"{len(every)} params for {num} prompts; give one for all, or one for each", param="params")
    for params in {id(p): p for p in every}.values():
        _check_types(params)
    return every


def _check_types(params: SamplingParams) -> None:
    """What a client's JSON is held to, for whoever builds SamplingParams in Python. Raises: RequestError."""
    for field in dataclasses.fields(params):
        kind, _, none = str(field.type).partition(" | ")
        value, wanted = getattr(params, field.name), _TYPES.get(kind)
        if wanted is None or (value is None and none == "None"):
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise RequestError(f"{field.name} is {value!r}; it must be of type {kind}", param=field.name)
