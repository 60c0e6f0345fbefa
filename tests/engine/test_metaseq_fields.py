"""metaseq's own fields do what metaseq's code does with them, for each sequence by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engines import ask, running_engine, tiny_model
from support.hf_opt import logits
from support.tiny_tokenizer import tiny_tokenizer

from metaseq_api.core import Request, SamplingParams
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.nucleus import DecayingTopP
from metaseq_api.engine.penalties import Adjustment, adjust
from metaseq_api.errors import RequestError

FULL_STOP = 4
PROMPT = [30, 207, 30, 40, 207, 50, 50]
SOURCE = [2, *PROMPT]
NUM_TOKENS = 263


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with running_engine(tmp_path) as e:
        yield e


def trace(tokens: list[int], *, top_p: float, decay: float, bound: float) -> list[float]:
    """The top_p that each token is drawn with, and that of the next."""
    nucleus = DecayingTopP(top_p=top_p, decay=decay, bound=bound, ends=frozenset({FULL_STOP, 116, 328}))
    out = [nucleus.value]
    for token in tokens:
        nucleus.note(token)
        out.append(nucleus.value)
    return out


def test_the_nucleus_decays_and_starts_anew_as_metaseqs_does() -> None:
    got = trace([9, 9, FULL_STOP, 9, 9, 9, 9, 9, 9, 9], top_p=0.9, decay=0.5, bound=0.2)
    assert got == pytest.approx([0.9, 0.9, 0.45, 0.9, 0.9, 0.45, 0.225, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("end", [4, 116, 328])
def test_each_sentence_end_starts_it_anew_and_nothing_else_does(end: int) -> None:
    got = trace([9, 9, 9, end, 50118, 9], top_p=0.8, decay=0.5, bound=0.0)
    assert got == pytest.approx([0.8, 0.8, 0.4, 0.2, 0.8, 0.8, 0.4])


def test_a_bound_above_top_p_raises_it_from_the_second_token_on() -> None:
    assert trace([9, 9], top_p=0.3, decay=0.9, bound=0.6) == pytest.approx([0.3, 0.6, 0.6])


def test_a_long_text_decays_to_nothing_without_failing() -> None:
    assert trace([9] * 5000, top_p=0.9, decay=0.01, bound=0.0)[-1] == 0.0


def metaseq_scores(values: np.ndarray, generated: list[int], p: SamplingParams, temperature: float = 1.0) -> np.ndarray:
    """Section by section after metaseq: log-softmax after temperature, then each pair of which one is above 0."""
    x = values.astype(np.float64) / temperature
    x = x - np.log(np.exp(x - x.max()).sum()) - x.max()
    c = np.bincount(generated, minlength=len(x)).astype(np.float64)
    s = np.bincount(SOURCE[: p.alpha_src_penalty_end_idx], minlength=len(x)).astype(np.float64)
    if p.alpha_frequency > 0 or p.alpha_presence > 0:
        x = x - p.alpha_frequency * c - p.alpha_presence * (c > 0)
    if p.alpha_frequency_src > 0 or p.alpha_presence_src > 0:
        x = x - p.alpha_frequency_src * s - p.alpha_presence_src * (s > 0)
    return x


FIELDS: list[dict[str, float | int]] = [
    {"alpha_frequency": 0.6},
    {"alpha_presence": 1.2},
    {"alpha_frequency_src": 0.6},
    {"alpha_presence_src": 1.2},
    {"alpha_presence": 2.0, "alpha_frequency": -0.5},
    {"alpha_frequency_src": 0.4, "alpha_presence_src": 0.3, "alpha_src_penalty_end_idx": 3},
    {"alpha_frequency": 0.1, "alpha_presence": 0.2, "alpha_frequency_src": 0.3, "alpha_presence_src": 0.4},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_penalties_are_metaseqs_formulas(fields: dict[str, float | int], temperature: float) -> None:
    p = SamplingParams(temperature=temperature, **fields)  # type: ignore[arg-type]
    values = torch.randn(1, NUM_TOKENS, generator=torch.Generator().manual_seed(4)) * 3
    generated = [9, 30, 30, 12, 30]
    made = Adjustment.of(p, SOURCE, NUM_TOKENS)
    assert made is not None
    for token in generated:
        made.note(token)
    scores = values / temperature
    adjust(scores, [(0, made, temperature)])
    want = metaseq_scores(values[0].numpy(), generated, p, temperature)
    # metaseq does not renormalise before the draw, which does
    np.testing.assert_allclose(scores[0].softmax(-1).numpy(), np.exp(want) / np.exp(want).sum(), atol=1e-6)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_greedy_text_under_penalties_is_metaseqs(engine: Engine, fields: dict[str, float | int]) -> None:
    """Token by token against Hugging Face's logits, for any n."""
    p = SamplingParams(temperature=0, **fields)  # type: ignore[arg-type]
    model, generated = tiny_model(), []
    for _ in range(16):
        row = logits(model, [*SOURCE, *generated])[-1].numpy().copy()
        row[[1, 2]] = row[NUM_TOKENS:] = -np.inf
        generated.append(int(metaseq_scores(row, generated, p).argmax()))
    got = ask(engine, PROMPT, max_tokens=16, temperature=0, ignore_eos=True, n=3, **fields)
    assert [list(c.token_ids) for c in got] == [generated] * 3
    (without,) = ask(engine, PROMPT, max_tokens=16, temperature=0, ignore_eos=True)
    assert list(without.token_ids) != generated


@pytest.mark.parametrize(
    ("low", "partner"), [("alpha_presence", "alpha_frequency"), ("alpha_frequency_src", "alpha_presence_src")]
)
def test_a_reward_that_metaseq_ignores_is_refused_and_one_it_applies_is_not(low: str, partner: str) -> None:
    with pytest.raises(RequestError, match="its partner is above 0") as caught:
        SamplingParams(**{low: -0.5})  # type: ignore[arg-type]
    assert caught.value.param == low
    SamplingParams(**{low: -0.5, partner: 0.1})  # type: ignore[arg-type]


def test_the_engine_draws_each_token_with_the_top_p_of_its_own_text(engine: Engine) -> None:
    """Two samples of one prompt and a stranger share the steps; each one's top_p follows its own full stops."""
    seen: dict[int, list[float]] = {}
    original = engine._sampler.draw

    def watched(logits_RV, rows):  # type: ignore[no-untyped-def]
        for r in rows:
            if r.params.lambda_decay:
                seen.setdefault(id(r.adjustment), []).append(r.top_p)
        return original(logits_RV, rows)

    engine._sampler.draw = watched  # type: ignore[method-assign]
    tokenizer = engine._tokenizer
    ends = {tokenizer.encode(mark)[0] for mark in ".?!"}
    stranger = engine.submit(
        Request(request_id="s", prompts=((70, 71),), params=SamplingParams(max_tokens=60, top_p=0.3, seed=8))
    )
    # the bias makes sentence ends likely and gives each sample an Adjustment of its own to be known by
    got = ask(
        engine,
        PROMPT,
        n=2,
        seed=5,
        max_tokens=30,
        temperature=1.5,
        top_p=0.9,
        lambda_decay=0.5,
        omega_bound=0.2,
        ignore_eos=True,
        logit_bias=tuple((end, 4.0) for end in sorted(ends)),
    )
    stranger.result(30)
    assert len(seen) == 2
    for completion, top_ps in zip(got, seen.values(), strict=True):
        nucleus = DecayingTopP(top_p=0.9, decay=0.5, bound=0.2, ends=frozenset(ends))
        want = []
        for token in completion.token_ids:
            want.append(nucleus.value)
            nucleus.note(token)
        assert top_ps == pytest.approx(want)
        assert ends & set(completion.token_ids), "no sentence ended; the test tests nothing"
        assert min(want) < 0.9
    assert len({c.token_ids for c in got}) == 2


def test_sentence_ends_are_the_three_marks_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert [tokenizer.decode([tokenizer.encode(mark)[0]]) for mark in ".?!"] == [".", "?", "!"]
