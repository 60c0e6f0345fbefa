"""What one client asked: token ids and sampling parameters, checked and frozen.

Knows the ranges that hold for any model. Does not know text, HTTP, or the limits of the model that serves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from metaseq_api.errors import RequestError

BOS_ID = 2
"""</s>, which goes in front of every prompt that does not begin with it: the documents of the training did."""
MAX_N = 128
MAX_LOGPROBS = 100
MAX_STOP = 64
MAX_STOP_LEN = 1024


def _check(ok: bool, param: str, found: object, wanted: str) -> None:
    if not ok:
        raise RequestError(f"{param} is {found!r}; it must be {wanted}", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Belongs to each sequence by itself; nothing is shared across a batch.

    temperature 0 means greedy. top_k None, top_p 1.0, seed None and logprobs None mean "off". `logprobs` k asks for the
    k likeliest tokens at each position beside the chosen one; 0 asks for the chosen one's alone.
    `ignore_eos` forbids the end-of-text token for the whole length, so that exactly max_tokens come back.

    Raises: RequestError naming the field.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        _check(
            math.isfinite(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "between 0 (greedy) and 100",
        )
        _check(0 <= self.top_p <= 1, "top_p", self.top_p, "between 0 and 1")
        _check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more, or null for off")
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer, or null")
        _check(1 <= self.n <= MAX_N, "n", self.n, f"between 1 and {MAX_N}")
        _check(
            self.best_of is None or self.n <= self.best_of <= MAX_N,
            "best_of",
            self.best_of,
            f"between n ({self.n}) and {MAX_N}",
        )
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"between 0 and {MAX_LOGPROBS}, or null",
        )
        _check(len(self.stop) <= MAX_STOP, "stop", f"{len(self.stop)} strings", f"at most {MAX_STOP} strings")
        for s in self.stop:
            _check(0 < len(s) <= MAX_STOP_LEN, "stop", s, f"strings of 1 to {MAX_STOP_LEN} characters")
        _check(
            self.max_tokens > 0 or self.echo, "max_tokens", 0, "1 or more, unless echo is true (to score the prompt)"
        )

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one; top_p 0 says so too, as it does in metaseq."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def num_samples(self) -> int:
        """How many continuations of each prompt are computed."""
        return self.best_of or self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One client's question: prompts (token ids; the engine puts </s> in front where it is not) and how to continue.

    `user` is carried for the log. Of a streamed request the engine tells every token as soon as it is final.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    user: str | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        n = self.params.n
        _check(
            not self.stream or self.params.num_samples == n,
            "best_of",
            self.params.best_of,
            f"n ({n}) or left out in a stream: which samples are the best is known when all have ended",
        )
