"""Biases and penalties are those of their sources: OpenAI's formula by hand, Hugging Face's processor as it is."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from metaseq_api.core import SamplingParams
from metaseq_api.engine.penalties import Adjustment, Tally, adjust
from metaseq_api.engine.sampler import Row, Sampler

VOCAB = 60
PROMPT = [2, 7, 9, 9, 31, 55]
GENERATED = [9, 12, 12, 12, 44, 7, 12]


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def adjustment(generated: list[int] = GENERATED, **params: object) -> Adjustment | None:
    made = Adjustment.of(SamplingParams(**params), PROMPT, VOCAB)  # type: ignore[arg-type]
    for token in generated if made else ():
        made.note(token)  # type: ignore[union-attr]
    return made


def adjusted(values: torch.Tensor, heat: float = 1.0, **params: object) -> torch.Tensor:
    """What is left of logits `values` that were divided by `heat` beforehand."""
    made = adjustment(**params)
    assert made is not None
    scores = values / heat
    adjust(scores, [(0, made, heat)])
    return scores


@pytest.mark.parametrize("heat", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (1.5, 2.0), (-2.0, 0.3), (-1.0, -1.0)])
def test_presence_and_frequency_are_openais_formula_on_generated_tokens(
    presence: float, frequency: float, heat: float
) -> None:
    values = logits()
    count = np.bincount(GENERATED, minlength=VOCAB)
    want = values.numpy()[0] - count * frequency - (count > 0) * presence
    got = adjusted(values, heat, presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(got[0].numpy(), want / heat, atol=1e-5)


@pytest.mark.parametrize("heat", [1.0, 0.7])
@pytest.mark.parametrize("penalty", [1.3, 0.6, 100.0])
def test_repetition_is_hugging_faces_over_prompt_and_generated_tokens(penalty: float, heat: float) -> None:
    values = logits()
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + GENERATED]), values)
    torch.testing.assert_close(adjusted(values, heat, repetition_penalty=penalty), want / heat)


def test_a_bias_is_added_before_all_else_and_before_the_temperature() -> None:
    values = logits()
    biased = values.clone()
    biased[0, [9, 50]] += torch.tensor([-100.0, 6.5])
    torch.testing.assert_close(adjusted(values, 0.5, logit_bias=((9, -100.0), (50, 6.5))), biased / 0.5)
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + GENERATED]), biased)
    want[0, sorted(set(GENERATED))] -= 0.9
    got = adjusted(values, 0.5, logit_bias=((9, -100.0), (50, 6.5)), repetition_penalty=1.7, presence_penalty=0.9)
    torch.testing.assert_close(got, want / 0.5)


def test_what_asks_for_nothing_costs_nothing() -> None:
    assert adjustment(temperature=0.3, min_p=0.1, alpha_src_penalty_end_idx=4, lambda_decay=0.9) is None


def test_before_the_first_token_only_the_prompt_counts() -> None:
    values = logits()
    torch.testing.assert_close(adjusted(values, generated=[], presence_penalty=1, frequency_penalty=2), values)
    want = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([PROMPT]), values)
    torch.testing.assert_close(adjusted(values, generated=[], repetition_penalty=2.0), want)


def test_ids_that_only_pad_the_model_are_passed_over() -> None:
    params = SamplingParams(repetition_penalty=1.5, alpha_presence_src=1.0, logit_bias=((59, 5.0), (3, 1.0)))
    made = Adjustment.of(params, [2, 58, 59, 7], 57)
    assert made is not None
    scores = logits()[:, :57].contiguous()
    before = scores.clone()
    adjust(scores, [(0, made, 1.0)])
    assert (scores != before).nonzero()[:, 1].tolist() == [2, 3, 7]


def test_a_tally_counts_as_numpy_does_however_long_it_grows() -> None:
    drawn = [random.Random(1).randrange(300) for _ in range(2000)]
    tally = Tally()
    for token in drawn:
        tally.add(token)
        if len(tally) % 50 == 0:
            tally.views()
    ids, values = tally.views()
    count = np.bincount(drawn, minlength=300)
    assert {int(i): float(v) for i, v in zip(ids, values, strict=True)} == {i: c for i, c in enumerate(count) if c}


def test_each_row_is_adjusted_by_its_own_alone() -> None:
    """Together with rows that ask for nothing, each row chooses as it does by itself, greedy and drawn."""
    every: list[dict[str, object]] = [
        {"temperature": 0},
        {"temperature": 0, "presence_penalty": 2.0},
        {"repetition_penalty": 1.8, "temperature": 0.4},
        {},
        {"logit_bias": ((40, 8.0),), "frequency_penalty": 1.0},
        {"alpha_frequency": 2.0, "alpha_presence_src": 3.0, "temperature": 0.9, "top_p": 0.8},
        {"min_p": 0.2, "repetition_penalty": 3.0},
    ]
    sampler = Sampler(num_tokens=VOCAB - 3, banned=[1])
    values = logits(3, rows=len(every))
    rows = []
    for at, given in enumerate(every):
        p = SamplingParams(**given)  # type: ignore[arg-type]
        rows.append(Row(params=p, uniform=at / 7, top_p=p.top_p, adjustment=adjustment(**given)))
    alone = [sampler.sample(values[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert sampler.sample(values, rows) == alone
    plain = sampler.sample(values, [Row(params=r.params, uniform=r.uniform, top_p=r.top_p) for r in rows])
    assert plain != alone
    whole = Sampler(num_tokens=VOCAB, banned=[1])
    turned = values.t().contiguous().t()  # the same numbers, lying otherwise
    assert whole.sample(turned, rows) == whole.sample(values, rows)


def test_log_probabilities_stay_the_models_own() -> None:
    values = logits()
    p = SamplingParams(logit_bias=((50, 100.0),), repetition_penalty=5.0, logprobs=0, temperature=0.5)
    row = Row(params=p, uniform=0.5, top_p=1.0, adjustment=Adjustment.of(p, PROMPT, VOCAB))
    (scored,) = Sampler(num_tokens=VOCAB, banned=[1]).sample(values, [row])
    assert scored is not None
    assert scored.token_id == 50
    assert scored.logprob == pytest.approx(float((values / 0.5).log_softmax(-1)[0, 50]), abs=1e-5)
