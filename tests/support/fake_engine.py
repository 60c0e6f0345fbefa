"""An engine without a model: bytes are tokens, and the completion of a prompt is the alphabet. Pure Python.

Id 2 is </s>; byte b is id b + 4. Sample s of a prompt starts at letter s, so that samples differ; a newline (never
generated) cannot end it, a stop string can. Answers wait while `hold` is set; `fail_with` is raised instead of one.
A streamed answer has a Delta for each letter, all there at once; while `hold` is set a test says what comes, and when.
"""

from __future__ import annotations

import itertools
import string
import threading
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

from metaseq_api.core import Completion, Delta, FinishReason, Health, Request, Stats, TokenLogprobs
from metaseq_api.errors import NotBegun

FIRST_BYTE = 4
UNLIKELY = float("-inf")


class FakeAnswer:
    """One answer; `cancelled` tells whether it was given up."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self.cancelled = threading.Event()
        self._deltas: deque[Delta] = deque()
        self._wake: Callable[[], None] | None = None
        self.error: Exception | None = None
        self.ended, self.admitted = False, engine.admits
        if engine.free.is_set():
            self.say_all() if request.stream else self.end(engine.fail_with)

    def say(self, text: str, index: int = 0) -> None:
        """Have a streamed answer go on."""
        self._deltas.append(Delta(index // self._request.params.n, index % self._request.params.n, text, len(text)))
        self._notify()

    def say_all(self) -> None:
        """Have a streamed answer come whole, sample by sample, a letter at a time."""
        for completion in [] if self._engine.fail_with else self._completions():
            self._deltas.extend(letters(completion))
        self.end(self._engine.fail_with)

    def end(self, error: Exception | None = None) -> None:
        """Have a streamed answer end."""
        self.error, self.ended = error, True
        self._notify()

    def admit(self) -> None:
        """Have a streamed request taken, where the engine did not do so at once."""
        self.admitted = True
        self._notify()

    def come(self) -> None:
        """Have an answer that is no stream come, if it has not."""
        if not self.ended and not self._request.stream:
            self.end(self._engine.fail_with)

    def watch(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        if self._deltas or self.ended:
            self._notify()

    def hand_to(self, hear: Callable[[str], object]) -> None:
        raise NotImplementedError("the server takes")

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake()

    def take(self) -> list[Delta]:
        ended, taken = self.ended, []
        while self._deltas:
            taken.append(self._deltas.popleft())
        if ended and not taken and self.error is not None:
            raise self.error
        return taken

    def events(self) -> Iterator[Delta]:
        raise NotImplementedError("the server takes")

    def result(self, timeout: float | None = None) -> list[Completion]:
        if not self.ended:
            assert timeout == 0, "the server waits for nobody"
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return self._completions()

    def _completions(self) -> list[Completion]:
        return [
            self._engine.complete(self._request, p, s)
            for p in range(len(self._request.prompts))
            for s in range(self._request.params.n)
        ]

    def cancel(self) -> None:
        self.cancelled.set()


def letters(completion: Completion) -> list[Delta]:
    """A completion as a stream tells it; tokens are letters here."""
    out, lists = [], completion.logprobs
    for at, letter in enumerate(completion.text):
        here = None
        if lists is not None:
            top = lists.top_logprobs
            here = TokenLogprobs(
                tokens=lists.tokens[at : at + 1],
                token_logprobs=lists.token_logprobs[at : at + 1],
                top_logprobs=None if top is None else top[at : at + 1],
                text_offset=lists.text_offset[at : at + 1],
            )
        out.append(Delta(completion.prompt_index, completion.sample_index, letter, 0, None, here))
    rest = lists and lists.after(len(completion.text))
    num, reason = completion.num_tokens, completion.finish_reason
    return [*out, Delta(completion.prompt_index, completion.sample_index, "", num, reason, rest)]


class _Free(threading.Event):
    """Lets answers that are no stream come as soon as it is set."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__()
        self._engine = engine

    def set(self) -> None:
        super().set()
        for answer in self._engine.answers:
            answer.come()


class FakeEngine:
    """Remembers every request and answer."""

    model_name = "fake"

    def __init__(self, max_seq_len: int = 64) -> None:
        self.max_seq_len = max_seq_len
        self.vocab_size = FIRST_BYTE + 256
        self.requests: list[Request] = []
        self.answers: list[FakeAnswer] = []
        self.submitted = threading.Semaphore(0)
        self.free = _Free(self)
        self.free.set()
        self.fail_with: Exception | None = None
        self.admits = True
        self.stopped = ""
        self.rank_age_s: tuple[float, ...] = (0.25, float("inf"))
        self.stuck, self.ready = "", True
        self.stats = Stats()

    def hold(self) -> None:
        """Let requests wait until `free` is set."""
        self.free.clear()

    def encode(self, text: str) -> list[int]:
        return [FIRST_BYTE + b for b in text.replace("\r\n", "\n").replace("\r", "\n").encode()]

    def decode(self, token_ids: Seq[int]) -> str:
        return bytes(t - FIRST_BYTE for t in token_ids if t >= FIRST_BYTE).decode(errors="replace")

    def submit(self, request: Request) -> FakeAnswer:
        if self.stopped:
            raise NotBegun(self.stopped)
        answer = FakeAnswer(self, request)
        self.requests.append(request)
        self.answers.append(answer)
        self.submitted.release()
        return answer

    def health(self) -> Health:
        return Health(
            alive=not self.stopped,
            reason=self.stopped or self.stuck,
            num_running=sum(not a.cancelled.is_set() for a in self.answers) if not self.free.is_set() else 0,
            num_waiting=0,
            num_free_blocks=8,
            num_blocks=8,
            rank_age_s=self.rank_age_s,
            stuck=bool(self.stuck),
            ready=self.ready and not self.stuck and not self.stopped,
        )

    def complete(self, request: Request, prompt_index: int, sample_index: int) -> Completion:
        params, prompt_ids = request.params, request.prompts[prompt_index]
        letters = itertools.islice(itertools.cycle(string.ascii_lowercase), sample_index, None)
        text = "".join(itertools.islice(letters, params.max_tokens))
        num_tokens, reason = len(text), FinishReason.LENGTH
        for stop in params.stop:
            if stop in text[params.min_tokens :]:
                at = text.index(stop, params.min_tokens)
                num_tokens, reason, text = at + len(stop), FinishReason.STOP, text[:at]
        prompt = self.decode(prompt_ids)
        generated = self.encode(text)
        shown = [*prompt_ids, *generated] if params.echo else generated
        return Completion(
            prompt_index=prompt_index,
            sample_index=sample_index,
            text=prompt + text if params.echo else text,
            token_ids=tuple(shown),
            finish_reason=reason,
            num_prompt_tokens=len(prompt_ids),
            num_tokens=num_tokens,
            first_top=tuple((5 + i, float(-i)) for i in range(params.logprobs or 0)),
            logprobs=None
            if params.logprobs is None
            else self._logprobs(shown, params.logprobs, params.echo, len(prompt)),
        )

    def _logprobs(self, ids: Seq[int], k: int, echo: bool, prompt_len: int) -> TokenLogprobs:
        tokens = tuple(self.decode([i]) for i in ids)
        known = tuple(None if echo and at == 0 else -0.5 for at in range(len(ids)))
        first = 0 if echo else prompt_len
        return TokenLogprobs(
            tokens=tokens,
            token_logprobs=known,
            top_logprobs=None
            if k == 0
            else tuple(None if p is None else {t: p, "never": UNLIKELY} for t, p in zip(tokens, known, strict=True)),
            text_offset=tuple(range(first, first + len(ids))),
        )
