"""The engine answers every request as if it were alone, whatever runs beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import WINDOW, ask, running_engine, slow_down, tiny_model
from support.hf_opt import logits

from metaseq_api.core import Completion, FinishReason, Request, SamplingParams
from metaseq_api.engine.engine import Engine
from metaseq_api.errors import EngineStopped, MetaseqApiError, Overloaded, RequestError


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running_engine(tmp_path, ahead=request.param) as e:
        yield e


def prompt(n: int, seed: int = 0) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(4, 260) for _ in range(n)]


def hf_greedy(ids: list[int], n: int) -> list[int]:
    model, out = tiny_model(), [2, *ids]
    for _ in range(n):
        row = logits(model, out)[-1].clone()
        row[1] = row[2] = row[263:] = -torch.inf
        out.append(int(row.argmax()))
    return out[len(ids) + 1 :]


def request(ids: list[int], **params: object) -> Request:
    return Request(request_id="r", prompts=(tuple(ids),), params=SamplingParams(**params))  # type: ignore[arg-type]


def test_greedy_text_is_hugging_faces(engine: Engine) -> None:
    (got,) = ask(engine, prompt(12), max_tokens=20, temperature=0, ignore_eos=True)
    assert list(got.token_ids) == hf_greedy(prompt(12), 20)
    assert got.finish_reason is FinishReason.LENGTH
    assert (got.num_prompt_tokens, got.num_tokens) == (12, 20)
    assert got.text == engine.decode(got.token_ids)


def test_max_tokens_is_meant(engine: Engine) -> None:
    for n in (1, 2, 16, WINDOW - 5):
        (got,) = ask(engine, prompt(4), max_tokens=n, ignore_eos=True)
        assert len(got.token_ids) == got.num_tokens == n


def mixed_load(n: int = 24) -> list[Request]:
    """Requests that differ in everything a request may differ in."""
    r = random.Random(5)
    return [
        request(
            prompt(r.randrange(0, 60), seed=i),
            max_tokens=r.randrange(1, 30),
            temperature=r.choice([0, 0, 0.7, 1.3]),
            top_p=r.choice([1.0, 0.9, 0.5]),
            top_k=r.choice([None, None, 1, 40]),
            seed=i,
            n=r.choice([1, 1, 2, 3]),
            stop=r.choice([(), ("e",), ("\n\n", "th")]),
            echo=r.random() < 0.3,
            logprobs=r.choice([None, 0, 3]),
            ignore_eos=r.random() < 0.5,
        )
        for i in range(n)
    ]


def plain(completions: list[Completion]) -> list[object]:
    """All that must not depend on the neighbours; log-probabilities to 3 digits (sums may be ordered otherwise)."""
    return [
        (
            c.text,
            c.token_ids,
            c.finish_reason,
            c.logprobs and c.logprobs.tokens,
            c.logprobs and c.logprobs.text_offset,
            c.logprobs and [None if x is None else round(x, 3) for x in c.logprobs.token_logprobs],
        )
        for c in completions
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize(
    "engine_options",
    [
        {},
        {"max_batch_tokens": 7},
        {"num_blocks": 13, "max_batch_tokens": 20},
        {"max_batch_size": 3},
        {"block_size": 1, "num_blocks": 150},
    ],
    ids=["roomy", "small chunks", "full pool", "few at once", "blocks of one"],
)
def test_a_mixed_load_answers_as_each_request_alone(
    tmp_path: Path, engine_options: dict[str, int], ahead: bool
) -> None:
    with running_engine(tmp_path) as alone:
        want = [plain(alone.submit(r).result(30)) for r in mixed_load()]
    with running_engine(tmp_path, ahead=ahead, **engine_options) as crowded:
        tickets = [crowded.submit(r) for r in mixed_load()]
        got = [plain(t.result(60)) for t in tickets]
    assert got == want


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_full_pool_preempts_and_nobody_fails(tmp_path: Path, ahead: bool) -> None:
    with running_engine(tmp_path, num_blocks=14, ahead=ahead) as engine:
        tracks = []
        original = engine._scheduler._preempt
        engine._scheduler._preempt = lambda seq: (tracks.append(seq), original(seq))[1]  # type: ignore[method-assign]
        tickets = [
            engine.submit(request(prompt(20, i), max_tokens=60, temperature=0, ignore_eos=True)) for i in range(4)
        ]
        got = [t.result(60)[0] for t in tickets]
    assert tracks, "the pool was never full; the test tests nothing"
    for i, c in enumerate(got):
        assert list(c.token_ids) == hf_greedy(prompt(20, i), 60)


def test_end_of_text_stops_and_is_not_in_the_answer(engine: Engine) -> None:
    for seed in range(200):
        (got,) = ask(engine, prompt(5), max_tokens=80, temperature=3.0, seed=seed)
        if got.finish_reason is FinishReason.STOP:
            break
    else:
        pytest.fail("no sample ended by itself")
    assert 2 not in got.token_ids
    assert got.num_tokens == len(got.token_ids) < 80


@pytest.mark.parametrize("params", [{}, {"echo": True}, {"echo": True, "max_tokens": 1}])
def test_whoever_counts_log_probabilities_finds_one_for_each_token_drawn_the_end_too(
    engine: Engine, params: dict[str, Any]
) -> None:
    """As OpenAI's and vLLM's lists have it; lm-eval takes the last entry of each list off, whatever it is."""
    asked = {"max_tokens": 80, "temperature": 0, "logprobs": 1, "logit_bias": ((2, 100.0),), **params}
    (got,) = ask(engine, prompt(5), **asked)
    assert (got.finish_reason, got.num_tokens) == (FinishReason.STOP, 0)
    assert got.logprobs is not None
    assert got.logprobs.tokens[-1] == "</s>"
    assert got.logprobs.text_offset[-1] == len(engine.decode(prompt(5)))
    assert {len(x) for x in (got.logprobs.tokens, got.logprobs.token_logprobs, got.logprobs.top_logprobs or ())} == {
        1 + 5 * params.get("echo", False)
    }
    assert got.logprobs_of_text == got.logprobs.first(len(got.token_ids))
    (by_token,) = ask(
        engine, prompt(5), max_tokens=9, temperature=0, logprobs=0, stop_token_ids=(7,), logit_bias=((7, 100.0),)
    )
    assert by_token.logprobs is not None
    assert len(by_token.logprobs.tokens) == 1


def test_min_tokens_holds_the_end_back(engine: Engine) -> None:
    for seed in range(40):
        (got,) = ask(engine, prompt(5), max_tokens=60, min_tokens=50, temperature=3.0, seed=seed)
        assert got.num_tokens >= 50


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine: Engine) -> None:
    (whole,) = ask(engine, prompt(6), max_tokens=40, seed=1, ignore_eos=True)
    stop = whole.text[10:13]
    cut = whole.text.index(stop)
    assert cut > 0
    (got,) = ask(engine, prompt(6), max_tokens=40, seed=1, ignore_eos=True, stop=(stop,), logprobs=0)
    assert got.text == whole.text[:cut]
    assert got.finish_reason is FinishReason.STOP
    assert got.logprobs is not None
    assert got.logprobs.text_offset[-1] - len(engine.decode(prompt(6))) < cut
    assert whole.token_ids[: len(got.token_ids)] == got.token_ids


def test_echo_scores_the_prompt_as_hugging_face_does(engine: Engine) -> None:
    ids = prompt(30)
    (got,) = ask(engine, ids, max_tokens=0, echo=True, logprobs=2)
    want = logits(tiny_model(), [2, *ids]).log_softmax(-1)
    assert got.logprobs is not None
    assert got.logprobs.token_logprobs == pytest.approx([float(want[i, t]) for i, t in enumerate(ids)], abs=1e-4)
    assert got.logprobs.top_logprobs is not None
    for i, top in enumerate(got.logprobs.top_logprobs):
        assert top is not None
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(want[i].topk(2).values.tolist(), abs=1e-4)
    assert got.text == engine.decode(ids)
    assert got.num_tokens == 0
    assert list(got.token_ids) == ids


def test_a_leading_end_of_text_token_is_the_clients_own_and_not_doubled(engine: Engine) -> None:
    ids = prompt(8)
    (with_it,) = ask(engine, [2, *ids], max_tokens=5, temperature=0, echo=True, logprobs=0, ignore_eos=True)
    (without,) = ask(engine, ids, max_tokens=5, temperature=0, echo=True, logprobs=0, ignore_eos=True)
    assert list(with_it.token_ids) == [2, *without.token_ids]
    assert with_it.logprobs is not None
    assert without.logprobs is not None
    assert with_it.logprobs.token_logprobs[0] is None
    assert with_it.logprobs.token_logprobs[1:] == pytest.approx(without.logprobs.token_logprobs)
    assert with_it.logprobs.tokens[0] == "</s>"


def test_an_echo_without_scores_needs_no_step(engine: Engine) -> None:
    (got,) = ask(engine, "the end", max_tokens=0, echo=True)
    assert (got.text, got.num_tokens, got.logprobs) == ("the end", 0, None)


def test_samples_come_prompt_by_prompt_and_differ(engine: Engine) -> None:
    got = ask(engine, prompt(9, 1), prompt(9, 2), max_tokens=12, n=3, seed=7)
    assert [(c.prompt_index, c.sample_index) for c in got] == [(p, s) for p in (0, 1) for s in range(3)]
    assert len({c.token_ids for c in got}) == 6
    assert plain(got) == plain(ask(engine, prompt(9, 1), prompt(9, 2), max_tokens=12, n=3, seed=7))


def test_best_of_keeps_the_likeliest(engine: Engine) -> None:
    every = ask(engine, prompt(9), max_tokens=12, n=6, best_of=6, seed=3, logprobs=0, ignore_eos=True)
    best = ask(engine, prompt(9), max_tokens=12, n=2, best_of=6, seed=3, ignore_eos=True)
    ranked = sorted(every, key=lambda c: -sum(x or 0 for x in c.logprobs.token_logprobs if c.logprobs))  # type: ignore[union-attr]
    assert [c.token_ids for c in best] == [c.token_ids for c in ranked[:2]]


def test_a_cancelled_request_frees_its_blocks_and_is_answered(engine: Engine) -> None:
    ticket = engine.submit(request(prompt(10), max_tokens=80, ignore_eos=True, n=4))
    ticket.cancel()
    with pytest.raises(RequestError, match="went away"):
        ticket.result(10)
    ask(engine, prompt(5), max_tokens=2)  # a later request sees the pool whole again (the fixture checks)


@pytest.mark.parametrize(
    ("ids", "params", "param"),
    [
        ([272], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([5] * 90, {"max_tokens": 10}, "max_tokens"),
        ([5] * 200, {}, "prompt"),
        ([5], {"n": 9}, "n"),
        ([5], {"n": 1, "best_of": 9}, "best_of"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(
    engine: Engine, ids: list[int], params: dict[str, int], param: str
) -> None:
    with pytest.raises(RequestError) as e:
        engine.submit(request(ids, **params))
    assert e.value.param == param


def test_the_window_can_be_filled_to_the_last_token(engine: Engine) -> None:
    """The last token is never fed: beside </s>, prompt and answer have the window for themselves."""
    for length in (WINDOW - 1, WINDOW - 2, 5):
        (got,) = ask(engine, prompt(length), max_tokens=WINDOW - length, temperature=0, ignore_eos=True)
        assert list(got.token_ids) == hf_greedy(prompt(length), WINDOW - length)


def test_a_cache_of_one_window_is_enough_to_fill_it(tmp_path: Path) -> None:
    with running_engine(tmp_path, num_blocks=WINDOW // 8, block_size=8) as engine:
        for length in (1, WINDOW - 1):
            same = {"max_tokens": WINDOW - length, "temperature": 0, "ignore_eos": True, "logprobs": 0, "echo": True}
            (got,) = ask(engine, prompt(length), **same)
            assert got.num_tokens == WINDOW - length
            assert got.logprobs is not None
            assert len(got.logprobs.tokens) == WINDOW
        for max_tokens in (WINDOW - 3, 100):
            with pytest.raises(RequestError, match="last of which needs no place"):
                engine.submit(request(prompt(4), max_tokens=max_tokens))


def test_more_than_the_queue_holds_is_refused(tmp_path: Path) -> None:
    with running_engine(tmp_path, max_queue=3) as engine:
        slow_down(engine)
        ticket = engine.submit(request(prompt(3), max_tokens=60, n=3, ignore_eos=True))
        with pytest.raises(Overloaded):
            engine.submit(request(prompt(3)))
        ticket.result(30)
        ask(engine, prompt(3), max_tokens=1)


def test_stopping_answers_everybody(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        tickets = [engine.submit(request(prompt(5, i), max_tokens=80, n=8, ignore_eos=True)) for i in range(40)]
        engine.stop(grace_s=0)
        endings: list[int] = []
        for t in tickets:
            try:
                endings.append(len(t.result(10)))
            except EngineStopped:
                endings.append(0)
        with pytest.raises(EngineStopped):
            engine.submit(request(prompt(3)))
        assert 0 in endings


def test_logits_that_are_not_numbers_fail_one_request_alone(engine: Engine) -> None:
    import metaseq_api.engine.sampler as sampler_module

    original = sampler_module.Sampler.draw

    def poisoned(self, logits_RV, rows):  # type: ignore[no-untyped-def]
        for i, r in enumerate(rows):
            if r.params.seed == 666:
                logits_RV[i] = torch.nan
        return original(self, logits_RV, rows)

    engine._sampler.draw = poisoned.__get__(engine._sampler)  # type: ignore[method-assign]
    bad = engine.submit(request(prompt(5), max_tokens=20, seed=666, ignore_eos=True))
    good = engine.submit(request(prompt(6), max_tokens=20, temperature=0, ignore_eos=True))
    with pytest.raises(MetaseqApiError, match="not numbers"):
        bad.result(20)
    assert list(good.result(20)[0].token_ids) == hf_greedy(prompt(6), 20)


def test_scores_that_are_not_numbers_fail_loudly_too(engine: Engine) -> None:
    original = engine._worker.run
    engine._worker.run = lambda batch: (x * torch.nan for x in original(batch) if x is not None)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(MetaseqApiError, match="not numbers"):
        ask(engine, prompt(8), max_tokens=0, echo=True, logprobs=0)
    engine._worker.run = original  # type: ignore[method-assign]
    ask(engine, prompt(8), max_tokens=0, echo=True, logprobs=0)


def test_other_ranks_hear_of_the_engine_while_requests_need_no_step(engine: Engine) -> None:
    beats = []
    original = engine._channel.send_heartbeat
    engine._channel.send_heartbeat = lambda: (beats.append(1), original())[1]  # type: ignore[method-assign]
    deadline = time.monotonic() + 20
    while len(beats) < 3:  # never idle for as long as a heartbeat takes
        ask(engine, "the", max_tokens=0, echo=True)
        assert time.monotonic() < deadline


def test_offsets_are_those_of_the_text_where_a_prompt_ends_inside_a_character(engine: Engine) -> None:
    half = [*engine.encode("ab"), engine.encode("€")[0]]
    (got,) = ask(engine, half, max_tokens=30, seed=3, echo=True, logprobs=0, ignore_eos=True)
    assert got.logprobs is not None
    for token, offset in zip(got.logprobs.tokens, got.logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert got.text[offset : offset + len(token)] == token


def test_a_failing_step_ends_the_engine_and_tells_everybody(tmp_path: Path) -> None:
    with running_engine(tmp_path, fails=True) as engine:
        engine._worker.run = lambda batch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        ticket = engine.submit(request(prompt(5)))
        with pytest.raises(EngineStopped, match="failed"):
            ticket.result(10)
        assert engine.wait_failed(10)
        assert not engine.health().alive
