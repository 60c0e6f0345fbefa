"""What one client asked: token ids and sampling parameters, checked and frozen.

Knows the ranges that hold for any model. Does not know text, HTTP, or the limits of the model that serves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from metaseq_api.errors import RequestError

BOS_ID = 2
"""</s>, which goes in front of every prompt that does not begin with it: the documents of the training did."""
MAX_N = 128
MAX_LOGPROBS = 100
MAX_STOP = 64
MAX_STOP_LEN = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024

# field -> least, most; None is always allowed where it is a field's default
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "n": (1, MAX_N),
    "alpha_presence": (-100, 100),
    "alpha_frequency": (-100, 100),
    "alpha_presence_src": (-100, 100),
    "alpha_frequency_src": (-100, 100),
    "lambda_decay": (0, 1),
    "omega_bound": (0, 1),
}
_PAIRS = (("alpha_presence", "alpha_frequency"), ("alpha_presence_src", "alpha_frequency_src"))


def _check(ok: bool, param: str, found: object, wanted: str) -> None:
    if not ok:
        raise RequestError(f"{param} is {found!r}; it must be {wanted}", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Belongs to each sequence by itself; nothing is shared across a batch.

    Every default means "off"; docs/fields.md says of each field what it does and in which order they act.
    temperature 0 means greedy. `logprobs` k asks for the k likeliest tokens at each position beside the chosen one; 0
    asks for the chosen one's alone; `prompt_logprobs` asks the same of the prompt. `logit_bias` is (token id, bias).
    `ignore_eos` forbids the end-of-text token for the whole length, so that exactly max_tokens come back.
    The alpha fields, lambda_decay (None: off) and omega_bound are metaseq's; alpha_src_penalty_end_idx counts tokens of
    the source, the </s> in front included (None: all of them).

    Raises: RequestError naming the field.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    alpha_presence: float = 0.0
    alpha_frequency: float = 0.0
    alpha_presence_src: float = 0.0
    alpha_frequency_src: float = 0.0
    alpha_src_penalty_end_idx: int | None = None
    lambda_decay: float | None = None
    omega_bound: float = 0.3

    def __post_init__(self) -> None:
        stop: object = self.stop
        if not isinstance(stop, tuple):  # a caller's list, or a single string, which is no sequence of letters
            object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(self.stop))
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not (value is None or least <= value <= most):
                _check(False, name, value, f"between {least} and {most}")
        self._check_counts()
        self._check_ends()
        for one, other in _PAIRS:  # metaseq applies a pair only where one of the two is above 0
            low, high = sorted((getattr(self, one), getattr(self, other)))
            name = one if getattr(self, one) == low else other
            wanted = "0 or more unless its partner is above 0; presence_penalty takes rewards"
            _check(low >= 0 or high > 0, name, low, wanted)

    def _check_counts(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        most = f"between 0 and max_tokens ({self.max_tokens})"
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, most)
        _check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more, or null for off")
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer, or null")
        best_of = self.n if self.best_of is None else self.best_of
        _check(best_of >= self.n, "best_of", best_of, f"n ({self.n}) or more")
        _check(best_of <= MAX_N, "best_of", best_of, f"{MAX_N} or less")
        end = self.alpha_src_penalty_end_idx
        _check(end is None or end >= 1, "alpha_src_penalty_end_idx", end, "1 or more, or null for the whole source")

    def _check_ends(self) -> None:
        _check(len(self.stop) <= MAX_STOP, "stop", f"{len(self.stop)} strings", f"at most {MAX_STOP} strings")
        for s in self.stop:
            _check(0 < len(s) <= MAX_STOP_LEN, "stop", s, f"strings of 1 to {MAX_STOP_LEN} characters")
        num = len(self.stop_token_ids)
        _check(num <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"{num} ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        low = min((*self.stop_token_ids, 0))
        _check(low >= 0, "stop_token_ids", low, "token ids, 0 or more")
        num = len(self.logit_bias)
        _check(num <= MAX_LOGIT_BIAS, "logit_bias", f"{num} tokens", f"at most {MAX_LOGIT_BIAS} tokens")
        _check(len(dict(self.logit_bias)) == num, "logit_bias", f"{num} tokens", "one bias for each token")
        for token_id, bias in self.logit_bias:
            _check(token_id >= 0, "logit_bias", token_id, "for token ids, 0 or more")
            _check(-100 <= bias <= 100, "logit_bias", bias, f"between -100 and 100 (token {token_id})")

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one; top_p 0 says so too, as it does in metaseq."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def num_samples(self) -> int:
        """How many continuations of each prompt are computed."""
        return self.best_of or self.n

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are asked for."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One client's question: prompts (token ids; the engine puts </s> in front where it is not) and how to continue.

    `user` is carried for the log. Of a streamed request the engine tells every token as soon as it is final. `tenant`
    (whose key it came with), `weight` and `priority` (lower comes first, within a tenant) are the Scheduler's to heed.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    user: str | None = None
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    deadline_s: float | None = None
    """When it is given up. Units: seconds of this process's time.monotonic()."""
    stream: bool = False

    def __post_init__(self) -> None:
        n = self.params.n
        _check(
            not self.stream or self.params.num_samples == n,
            "best_of",
            self.params.best_of,
            f"n ({n}) or left out in a stream: which samples are the best is known when all have ended",
        )
