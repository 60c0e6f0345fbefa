"""A kept answer is given only to the same question, and only where it is the only right one."""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path

import pytest
from support.engines import ask, running_engine

from metaseq_api.core import Completion, FinishReason, Request, SamplingParams
from metaseq_api.engine.results import ResultCache
from metaseq_api.errors import Overloaded

GREEDY = SamplingParams(temperature=0, max_tokens=8)
OTHER: dict[str, object] = {
    "stop": ("x",),
    "stop_token_ids": (7,),
    "logit_bias": ((7, 1.0),),
    "top_k": 3,
    "seed": 9,
    "best_of": 4,
    "logprobs": 1,
    "prompt_logprobs": 1,
    "alpha_src_penalty_end_idx": 3,
    "lambda_decay": 0.9,
    "omega_bound": 0.5,
}


def request(prompt: tuple[int, ...] = (5, 6), params: SamplingParams = GREEDY, name: str = "a") -> Request:
    return Request(request_id=name, prompts=(prompt,), params=params, user=name)


def answer(text: str) -> list[Completion]:
    return [
        Completion(
            prompt_index=0,
            sample_index=0,
            text=text,
            token_ids=(7,),
            finish_reason=FinishReason.LENGTH,
            num_prompt_tokens=2,
            num_tokens=1,
        )
    ]


def test_the_same_question_is_answered_whoever_asks() -> None:
    cache = ResultCache(4)
    cache.add(request(name="a"), answer("one"))
    assert cache.find(request(name="b")) == answer("one")
    assert cache.find(request(prompt=(5, 6, 7))) is None


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SamplingParams)])
def test_every_sampling_field_is_part_of_the_question(field: str) -> None:
    cache = ResultCache(4)
    cache.add(request(), answer("one"))
    value = getattr(GREEDY, field)
    if field in OTHER:
        changed = OTHER[field]
    elif isinstance(value, bool):
        changed = not value
    elif isinstance(value, (int, float)):
        changed = value / 2 if field == "top_p" else value + 1
    else:
        pytest.fail(f"the test has no other value for {field}; add one to OTHER")
    assert cache.find(request(params=dataclasses.replace(GREEDY, **{field: changed}))) is None  # type: ignore[arg-type]


def test_what_is_drawn_at_random_is_not_kept_unless_asked_for() -> None:
    cache, drawn = ResultCache(4), request(params=SamplingParams())
    cache.add(drawn, answer("one"))
    assert cache.find(drawn) is None
    assert len(cache) == 0


def test_a_random_request_is_answered_from_a_full_list_of_different_answers() -> None:
    cache, drawn = ResultCache(4, 2, random.Random(0)), request(params=SamplingParams())
    for text in ("one", "one"):
        cache.add(drawn, answer(text))
        assert cache.find(drawn) is None
    cache.add(drawn, answer("two"))
    cache.add(drawn, answer("three"))
    given = [cache.find(drawn) for _ in range(20)]
    assert answer("one") in given
    assert answer("two") in given
    assert answer("three") not in given


def test_a_certain_answer_needs_no_full_list() -> None:
    cache = ResultCache(4, 5)
    for params in (GREEDY, SamplingParams(seed=1), SamplingParams(max_tokens=0, echo=True)):
        cache.add(request(params=params), answer("one"))
        assert cache.find(request(params=params)) == answer("one")


def test_the_least_recently_asked_goes_first() -> None:
    cache = ResultCache(2)
    cache.add(request((1,)), answer("one"))
    cache.add(request((2,)), answer("two"))
    assert cache.find(request((1,)))
    cache.add(request((3,)), answer("three"))
    assert [cache.find(request((i,))) is not None for i in (1, 2, 3)] == [True, False, True]


def test_the_engine_computes_a_repeated_question_once(tmp_path: Path) -> None:
    with running_engine(tmp_path, results=ResultCache(8)) as engine:
        orders: list[object] = []
        original = engine._channel.send_batch
        engine._channel.send_batch = lambda batch: (orders.append(batch), original(batch))[1]  # type: ignore[method-assign]
        want = ask(engine, [5, 6, 7], temperature=0, max_tokens=8, n=2, best_of=3, logprobs=1)
        num = len(orders)
        assert ask(engine, [5, 6, 7], temperature=0, max_tokens=8, n=2, best_of=3, logprobs=1) == want
        assert len(orders) == num
        assert ask(engine, [5, 6, 7], temperature=0, max_tokens=9, n=2, best_of=3, logprobs=1) != want
        assert len(orders) > num


def test_a_known_answer_is_given_also_when_the_queue_is_full(tmp_path: Path) -> None:
    with running_engine(tmp_path, results=ResultCache(8), max_queue=1) as engine:
        want = ask(engine, [5, 6, 7], temperature=0)
        original, gate = engine._worker.run, threading.Event()
        engine._worker.run = lambda batch: gate.wait(30) and original(batch)  # type: ignore[method-assign, assignment, return-value]
        waiting = engine.submit(request(params=SamplingParams(max_tokens=80, ignore_eos=True)))
        assert ask(engine, [5, 6, 7], temperature=0) == want
        with pytest.raises(Overloaded):
            ask(engine, [5, 6, 8], temperature=0)
        gate.set()
        waiting.result(30)
