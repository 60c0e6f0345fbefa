"""Answers are the same, bit by bit, whether the head of a prompt was computed or found, and whatever else runs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engines import WINDOW, ask, running_engine

from metaseq_api.core import Request, SamplingParams
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


def hits(engine: Engine) -> int:
    return engine._scheduler.prefix_hits_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
def test_answers_have_the_same_bits_with_the_cache_on_or_off(
    tmp_path: Path, options: dict[str, int], dtype: torch.dtype
) -> None:
    with running_engine(tmp_path, prefix_cache=False, dtype=dtype) as off:
        want = [off.submit(r).result(30) for r in requests()]
        assert hits(off) == 0
    with running_engine(tmp_path, dtype=dtype, **options) as on:  # type: ignore[arg-type]
        alone = [on.submit(r).result(30) for r in requests()]
        tickets = [on.submit(r) for r in requests()]
        together = [t.result(60) for t in tickets]
        assert hits(on) > 400
    assert alone == want
    assert together == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_answers_have_the_same_bits_alone_or_preempted_among_others(
    tmp_path: Path, prefix_cache: bool, dtype: torch.dtype
) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.2, ignore_eos=True, logprobs=3)
    asked = [
        Request(request_id=str(i), prompts=(tuple(ids(9 + i, i)),), params=replace(params, seed=i)) for i in range(6)
    ]
    with running_engine(tmp_path, dtype=dtype) as engine:
        want = [engine.submit(r).result(30) for r in asked]
    preempted = []
    with running_engine(tmp_path, dtype=dtype, num_blocks=24, prefix_cache=prefix_cache) as engine:
        original = engine._scheduler._preempt
        engine._scheduler._preempt = lambda seq: (preempted.append(seq.seq_id), original(seq))[1]  # type: ignore[method-assign, func-returns-value]
        tickets = [engine.submit(r) for r in asked]
        assert [t.result(60) for t in tickets] == want
    assert preempted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_many_samples_has_the_bits_of_one_asked_for_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    params: dict[str, object] = {"max_tokens": 20, "seed": 7, "logprobs": 3, "ignore_eos": True}
    with running_engine(tmp_path, dtype=dtype) as engine:
        (alone,) = ask(engine, ids(30, 5), **params)
        many = ask(engine, ids(30, 5), n=7, **params)
    assert many[0] == alone


def test_a_chats_next_turn_finds_all_but_the_last_answer(tmp_path: Path) -> None:
    with running_engine(tmp_path) as on, running_engine(tmp_path, prefix_cache=False) as off:
        history, known = ids(20, 1), 0
        for turn in range(3):
            params = {"temperature": 0.8, "seed": turn, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
            before = hits(on)
            got = ask(on, history, **params)
            assert got == ask(off, history, **params)
            assert hits(on) - before == known
            known = (len(history) + 1) // 8 * 8  # with </s> in front
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
