"""Every field of a request does what it says in a whole engine; the same seed gives the same text in any company."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engines import ask, running_engine, tiny_model
from support.hf_opt import logits

from metaseq_api.core import FinishReason, Request, SamplingParams
from metaseq_api.engine.engine import Engine
from metaseq_api.errors import RequestError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with running_engine(tmp_path) as e:
        yield e


def prompt(n: int, seed: int = 0) -> list[int]:
    r = random.Random(seed)
    return [r.randrange(4, 260) for _ in range(n)]


def request(ids: list[int], **params: object) -> Request:
    return Request(request_id="r", prompts=(tuple(ids),), params=SamplingParams(**params))  # type: ignore[arg-type]


FIELDS: list[dict[str, object]] = [
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"presence_penalty": -1.5},
    {"repetition_penalty": 1.4, "top_p": 0.9},
    {"repetition_penalty": 0.8, "min_p": 0.02},
    {"logit_bias": ((60, 3.0), (61, -100.0)), "temperature": 1.2},
    {"alpha_presence": 0.8, "alpha_frequency_src": 0.3, "top_p": 0.9, "lambda_decay": 0.8, "omega_bound": 0.2},
    {"alpha_presence_src": 1.0, "alpha_src_penalty_end_idx": 3, "temperature": 0},
    {"stop_token_ids": (70, 90, 207), "min_tokens": 4},
    {"stop": ("e", "\n"), "include_stop_str_in_output": True},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 2.0},
    {"prompt_logprobs": 2, "echo": True, "logprobs": 1},
    {"best_of": 4, "n": 2, "frequency_penalty": 2.0},
    {},
    {"temperature": 0},
]


def load(num: int) -> list[Request]:
    r = random.Random(9)
    return [
        request(
            prompt(r.randrange(1, 50), seed=i),
            **{"max_tokens": r.randrange(5, 30), "seed": i % 5, "n": r.choice([1, 2, 3]), **FIELDS[i % len(FIELDS)]},
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_blocks": 14, "max_batch_tokens": 20}, {"max_batch_size": 5, "max_batch_tokens": 7}],
    ids=["roomy", "full pool", "few at once in small chunks"],
)
def test_the_same_seed_gives_the_same_text_whatever_else_runs(
    tmp_path: Path, options: dict[str, int], ahead: bool
) -> None:
    requests = load(2 * len(FIELDS))
    with running_engine(tmp_path) as quiet:
        want = [[(c.token_ids, c.finish_reason) for c in quiet.submit(r).result(30)] for r in requests]
    order = list(range(len(requests)))
    random.Random(3).shuffle(order)
    with running_engine(tmp_path, ahead=ahead, **options) as busy:
        noise = [busy.submit(request(prompt(20, 99 + i), max_tokens=40, n=2)) for i in range(4)]  # unseeded
        tickets = {i: busy.submit(requests[i]) for i in order}
        got = [[(c.token_ids, c.finish_reason) for c in tickets[i].result(60)] for i in range(len(requests))]
        for ticket in noise:
            ticket.result(60)
    assert got == want
    assert len({tokens for answer in want for tokens, _ in answer}) > len(requests)


def test_samples_of_one_seed_differ_and_the_first_of_them_are_those_of_a_smaller_n(engine: Engine) -> None:
    few = ask(engine, prompt(9), n=2, seed=11, max_tokens=20, presence_penalty=1.0, ignore_eos=True)
    many = ask(engine, prompt(9), n=5, seed=11, max_tokens=20, presence_penalty=1.0, ignore_eos=True)
    assert [c.token_ids for c in many[:2]] == [c.token_ids for c in few]
    assert len({c.token_ids for c in many}) == 5
    assert ask(engine, prompt(9), seed=12, max_tokens=20, ignore_eos=True) != few[:1]


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": (5, -1)},
        {"logit_bias": ((-1, 0.0),)},
        {"logit_bias": ((5, 1.0), (5, 2.0))},
        {"min_p": math.nan},
        {"presence_penalty": math.inf},
        {"alpha_src_penalty_end_idx": 0},
    ],
)
def test_what_has_no_meaning_is_refused_by_field_whoever_asks(params: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(params))


EXTREMES: dict[str, tuple[object, ...]] = {
    "temperature": (0, 1e-300, 1e-6, 0.7, 1.0, 100.0),
    "top_p": (1.0, 1e-300, 0.5, 0.999999),
    "top_k": (None, None, 1, 2, 262, 272, 10**9),
    "min_p": (0, 1e-300, 0.5, 1.0),
    "repetition_penalty": (1, 0.01, 100.0),
    "presence_penalty": (0, -2, 2),
    "frequency_penalty": (0, -2, 2),
    "alpha_presence": (0, 100, 1),
    "alpha_frequency": (0, 100, 1),
    "alpha_presence_src": (0, 100, 1),
    "alpha_frequency_src": (0, 100, 1),
    "alpha_src_penalty_end_idx": (None, 1, 10**6),
    "lambda_decay": (None, 1e-300, 0.5, 1.0),
    "omega_bound": (0, 0.3, 1),
    "logit_bias": ((), ((2, 100.0), (271, 100.0)), tuple((i, -100.0) for i in range(272)), ((1, 100.0),)),
    "stop_token_ids": ((), (2,), tuple(range(100, 228)), (271, 10**6)),
    "ignore_eos": (False, True),
    "min_tokens": (0, 6),
    "logprobs": (None, 0, 100),
    "prompt_logprobs": (None, None, 100),
    "n": (1, 2),
}


def test_no_combination_of_fields_is_too_much_for_the_numbers(engine: Engine) -> None:
    r = random.Random(6)
    tickets = []
    for i in range(150):
        params = {name: r.choice(values) for name, values in EXTREMES.items()}
        tickets.append(engine.submit(request(prompt(r.randrange(1, 20), i), max_tokens=6, seed=i, **params)))
    for ticket in tickets:
        for completion in ticket.result(60):
            assert all(0 <= t < 263 and t != 1 for t in completion.token_ids)


def test_an_engine_penalises_what_each_sample_generated_itself(engine: Engine) -> None:
    """Greedy text under OpenAI's penalties, token by token against Hugging Face's logits."""
    model, ids = tiny_model(), [2, *prompt(8)]
    for _ in range(20):
        row = logits(model, ids)[-1].clone()
        generated = torch.tensor(ids[9:], dtype=torch.long).bincount(minlength=len(row))
        row -= generated * 0.3 + (generated > 0) * 1.1
        row[1] = row[2] = row[263:] = -torch.inf
        ids.append(int(row.argmax()))
    got = ask(
        engine, prompt(8), max_tokens=20, temperature=0, ignore_eos=True, n=2, presence_penalty=1.1,
        frequency_penalty=0.3,
    )  # fmt: skip
    assert [list(c.token_ids) for c in got] == [ids[9:]] * 2
    assert len(set(ids[9:])) > 10


def test_a_bias_of_a_hundred_chooses_and_of_minus_a_hundred_forbids(engine: Engine) -> None:
    (got,) = ask(engine, prompt(5), max_tokens=8, logit_bias=((77, 100.0),), ignore_eos=True)
    assert got.token_ids == (77,) * 8
    (plain,) = ask(engine, prompt(5), max_tokens=8, temperature=0, ignore_eos=True)
    banned = tuple((i, -100.0) for i in sorted(set(plain.token_ids)))
    (other,) = ask(engine, prompt(5), max_tokens=8, temperature=0, ignore_eos=True, logit_bias=banned)
    assert not set(other.token_ids) & set(plain.token_ids)


def test_a_stop_token_ends_the_text_before_it_or_with_it(engine: Engine) -> None:
    (whole,) = ask(engine, prompt(6), max_tokens=40, seed=1, ignore_eos=True)
    stop = whole.token_ids[10]
    at = whole.token_ids.index(stop)
    same: dict[str, object] = {"max_tokens": 40, "seed": 1, "ignore_eos": True, "stop_token_ids": (stop,)}
    (before,) = ask(engine, prompt(6), **same, logprobs=1)
    assert before.token_ids == whole.token_ids[:at]
    assert before.text == engine.decode(whole.token_ids[:at])
    assert before.finish_reason is FinishReason.STOP
    assert before.logprobs is not None
    assert len(before.logprobs.tokens) - 1 == before.num_tokens == at
    (behind,) = ask(engine, prompt(6), **same, include_stop_str_in_output=True)
    assert behind.token_ids == whole.token_ids[: at + 1]
    assert behind.text == engine.decode(whole.token_ids[: at + 1])
    assert behind.finish_reason is FinishReason.STOP


def test_min_tokens_holds_stop_tokens_back_too(engine: Engine) -> None:
    every = tuple(range(100, 228))
    for seed in range(10):
        (got,) = ask(engine, prompt(6), max_tokens=30, min_tokens=12, seed=seed, stop_token_ids=every)
        assert 12 <= got.num_tokens < 30
        assert not set(got.token_ids) & set(every)


def test_a_stop_string_can_stay_in_the_text_which_ends_with_it(engine: Engine) -> None:
    (whole,) = ask(engine, prompt(6), max_tokens=40, seed=1, ignore_eos=True)
    stop = whole.text[10:13]
    cut = whole.text.index(stop) + len(stop)
    same: dict[str, object] = {"max_tokens": 40, "seed": 1, "ignore_eos": True, "stop": (stop,)}
    (got,) = ask(engine, prompt(6), **same, include_stop_str_in_output=True, logprobs=0, echo=True)
    assert got.text == engine.decode(prompt(6)) + whole.text[:cut]
    assert got.finish_reason is FinishReason.STOP
    assert got.logprobs is not None
    assert got.logprobs.text_offset[-1] < len(got.text)


@pytest.mark.parametrize("own_start", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_logprobs_are_hugging_faces_with_their_ranks(engine: Engine, own_start: bool, max_tokens: int) -> None:
    ids = [2, *prompt(12)] if own_start else prompt(12)
    got = ask(engine, ids, max_tokens=max_tokens, prompt_logprobs=3, n=2, temperature=0.5)
    row = logits(tiny_model(), ids if own_start else [2, *ids])
    want = (row / 0.5).log_softmax(-1)
    for completion in got:
        entries = completion.prompt_logprobs
        assert entries is not None
        assert len(entries) == completion.num_prompt_tokens == len(ids)
        if own_start:
            assert entries[0] is None
        for at, token in enumerate(ids[own_start:]):
            entry = entries[at + own_start]
            assert entry is not None
            top = want[at].topk(3).indices.tolist()
            assert set(entry) == {token, *top}
            assert [entry[i].rank for i in top] == [1, 2, 3]
            assert entry[token].rank == int((want[at] > want[at, token]).sum()) + 1
            assert entry[token].logprob == pytest.approx(float(want[at, token]), abs=1e-4)
            assert entry[token].text == engine._tokenizer.token_text(token)
        assert completion.logprobs is None


def test_each_kind_of_prompt_scores_has_its_own_number_of_alternatives(engine: Engine) -> None:
    (got,) = ask(engine, prompt(8), max_tokens=2, echo=True, logprobs=1, prompt_logprobs=4, temperature=0)
    assert got.logprobs is not None
    assert got.logprobs.top_logprobs is not None
    assert got.prompt_logprobs is not None
    assert all(top is not None and len(top) <= 2 for top in got.logprobs.top_logprobs)
    assert all(entry is not None and 4 <= len(entry) <= 5 for entry in got.prompt_logprobs)


def test_the_chosen_token_is_always_among_the_top_with_the_same_number(engine: Engine) -> None:
    (got,) = ask(engine, prompt(8), max_tokens=30, logprobs=2, temperature=3.0, seed=4, echo=True, ignore_eos=True)
    assert got.logprobs is not None
    assert got.logprobs.top_logprobs is not None
    sizes = set()
    for token, logprob, top in zip(
        got.logprobs.tokens, got.logprobs.token_logprobs, got.logprobs.top_logprobs, strict=True
    ):
        assert top is not None
        assert top[token] == logprob
        sizes.add(len(top))
    assert sizes == {2, 3}


def test_best_of_judges_an_empty_text_by_the_end_it_chose(engine: Engine) -> None:
    """A sample that ends at once says nothing; it may win only by the likelihood of its end."""
    everything: dict[str, object] = {"max_tokens": 6, "seed": 2, "logit_bias": ((2, 6.0),), "temperature": 1.0}
    every = ask(engine, prompt(9), n=8, best_of=8, **everything, logprobs=0)
    assert 0 < sum(c.num_tokens == 0 for c in every) < 8, "no sample, or every one, ended at once"
    (best,) = ask(engine, prompt(9), n=1, best_of=8, **everything)
    assert best.num_tokens > 0
    end = float(logits(tiny_model(), [2, *prompt(9)])[-1].log_softmax(-1)[2])
    assert best.mean_logprob > end
