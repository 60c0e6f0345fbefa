"""What each side is asked, and how long it takes: prompts that are nobody else's, answered to the last token.

Two times are never mixed: that until every request has its first token (the prompts'), and that of the tokens after it.
Both are of one run: the engine's own counts tell when the first tokens were there, Hugging Face's streamer tells the
same of `generate`. Prompt tokens are never counted as output. Does not know what is made of the times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metaseq_api.bench import peer
from metaseq_api.core import Request, SamplingParams
from metaseq_api.engine.engine import Engine

Clock = Callable[[], float]
SHORTEST, LONGEST = 64, 256
"""Units: tokens of the prompts of many requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of one run. first: until every request had a token; made: how many there were by then; whole: to the end.

    Units: seconds from the first request; tokens.
    """

    first: float
    made: int
    whole: float

    def rate_after(self, num_tokens: int) -> float:
        """Tokens a second after the first, of so many in all."""
        return (num_tokens - self.made) / (self.whole - self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; as it comes, greedily."""

    temperature: float = 0.0
    top_p: float = 1.0

    def as_peer(self) -> dict[str, Any]:
        """What Hugging Face's `generate` is told; by itself it would take the 50 likeliest alone."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


Generate = Callable[[list[list[int]], int], Times]
"""Continue every prompt by exactly so many tokens, and wait."""


def by_engine(engine: Engine, clock: Clock = time.perf_counter, how: Sampling = Sampling()) -> Generate:
    """Run in this thread, which must be the one that loaded the model."""
    stats = engine.stats

    def made() -> tuple[int, int]:
        begun = sum(stats.first_token_s.counts)
        return begun, begun + sum(stats.inter_token_s.counts)

    def generate(prompts: list[list[int]], num: int) -> Times:
        params = SamplingParams(max_tokens=num, temperature=how.temperature, top_p=how.top_p, ignore_eos=True)
        (begun, before), first, by_then = made(), 0.0, 0
        began = clock()
        tickets = [engine.submit(Request(request_id="bench", prompts=(tuple(p),), params=params)) for p in prompts]
        while not all(t.ended for t in tickets):
            engine.turn()
            if not by_then and made()[0] == begun + len(prompts):
                first, by_then = clock() - began, made()[1] - before
        return Times(first=first, made=by_then, whole=clock() - began)

    return generate


def by_peer(model: Any, clock: Clock = time.perf_counter, how: Sampling = Sampling()) -> Generate:
    """A batch of unlike lengths is padded on the left, as Hugging Face has it."""

    def generate(prompts: list[list[int]], num: int) -> Times:
        came: list[float] = []  # the prompts, then each token of all
        began = clock()
        peer.generate(model, prompts, num, how=how.as_peer(), told=lambda: came.append(clock() - began))
        whole = clock() - began
        assert len(came) == 1 + num, len(came)
        return Times(first=came[1], made=len(prompts), whole=whole)

    return generate


def prompt(length: int, seed: str) -> list[int]:
    """</s> and random ids of the vocabulary's ordinary tokens."""
    r = random.Random(f"{length}-{seed}")
    return [2, *(r.randrange(4, 2000) for _ in range(length - 1))]


def mixed(num: int, seed: str, shortest: int = SHORTEST, longest: int = LONGEST) -> list[list[int]]:
    """Prompts of unlike lengths; the lengths are the same for every seed, the ids are not."""
    lengths = random.Random(1234)
    return [prompt(lengths.randint(shortest, longest), f"{seed}-{i}") for i in range(num)]
