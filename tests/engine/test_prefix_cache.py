"""Answers are the same whether the head of a prompt was computed for it or found.

Not bit by bit: linear layers give a row the same bits whatever its neighbours (oneDNN, two rows and more), but torch's
fused attention takes other products for other lengths, so that log-probabilities in fp32 may differ in the last bits.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.engines import WINDOW, ask, running_engine

from metaseq_api.core import Completion, Request, SamplingParams
from metaseq_api.engine.engine import Engine
from metaseq_api.errors import MetaseqApiError

LOADS: dict[str, dict[str, int]] = {
    "roomy": {},
    "small chunks": {"max_batch_tokens": 9},
    "full pool": {"num_blocks": 14},
    "few at once": {"max_batch_size": 3},
}


def ids(n: int, seed: int) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(4, 260) for _ in range(n)]


def requests() -> list[Request]:
    """Prompts with heads in common, of all lengths beside the blocks' borders, asked for in many ways."""
    r = random.Random(11)
    made = []
    for i in range(40):
        prompt = ids(r.choice([7, 15, 16, 31, 40, 63]), seed=i % 3)[: r.randrange(1, 64)] + ids(r.randrange(9), seed=i)
        params = SamplingParams(
            max_tokens=r.randrange(1, min(24, WINDOW - len(prompt))),
            temperature=r.choice([0, 0.7, 1.3]),
            top_p=r.choice([1.0, 0.8]),
            seed=i,
            n=r.choice([1, 1, 2]),
            echo=r.random() < 0.3,
            logprobs=2,
        )
        made.append(Request(request_id=str(i), prompts=(tuple(prompt),), params=params))
    return made


def check_same(got: list[Completion], want: list[Completion]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert a.logprobs.token_logprobs == pytest.approx(b.logprobs.token_logprobs, abs=1e-5)


def hits(engine: Engine) -> int:
    return engine._scheduler.prefix_hits_tokens


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
def test_answers_are_the_same_with_the_cache_on_or_off(tmp_path: Path, options: dict[str, int]) -> None:
    with running_engine(tmp_path, prefix_cache=False) as off:
        want = [off.submit(r).result(30) for r in requests()]
        assert hits(off) == 0
    with running_engine(tmp_path, **options) as on:  # type: ignore[arg-type]
        alone = [on.submit(r).result(30) for r in requests()]
        tickets = [on.submit(r) for r in requests()]
        together = [t.result(60) for t in tickets]
        assert hits(on) > 400
    for a, b, w in zip(alone, together, want, strict=True):
        check_same(a, w)
        check_same(b, w)


def test_a_chats_next_turn_finds_the_last_answer(tmp_path: Path) -> None:
    with running_engine(tmp_path) as on, running_engine(tmp_path, prefix_cache=False) as off:
        history = ids(20, 1)
        for turn in range(3):
            params = {"temperature": 0.8, "seed": turn, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
            before = hits(on)
            got = ask(on, history, **params)
            check_same(got, ask(off, history, **params))
            assert hits(on) - before >= (0 if turn == 0 else len(history) - 4 - 8)
            history += [*got[0].token_ids, *ids(3, turn)]


def test_values_that_are_not_numbers_are_computed_anew(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        (want,) = ask(engine, ids(30, 2), max_tokens=4, temperature=0)
        original = engine._worker.run
        engine._worker.run = lambda batch: (x * float("nan") for x in original(batch) if x is not None)  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(MetaseqApiError, match="not numbers"):
            ask(engine, ids(30, 2), max_tokens=4, temperature=0)
        engine._worker.run = original  # type: ignore[method-assign]
        before = hits(engine)
        assert ask(engine, ids(30, 2), max_tokens=4, temperature=0) == [want]
        assert hits(engine) == before
