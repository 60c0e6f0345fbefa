"""Tokens chosen by the kernel of our own: of those that the rules leave, each as often as it weighs, whatever else the
batch holds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from support.own_kernels import needs_own, own
from torch import Tensor

from metaseq_api.engine.choosing import LIKELIEST, ByTorch, Choice

pytestmark = needs_own
LAST = 1 - 2**-53


def scores(rows: int, width: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Some of them -inf, rows further apart than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, width + 24, generator=generator) * spread)[:, :width]
    values[torch.rand(rows, width, generator=generator) < 0.2] = -torch.inf
    values[:, seed % width] = 0.25
    return values


def told(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The highest scores, and the tokens chosen."""
    return drawn[:, 1].float(), drawn[:, 0].long()


def draw(values: Tensor, choices: Sequence[Choice], banned: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    return told(own().draw(values, choices, banned))


def left(row: list[float], choice: Choice) -> list[int]:
    """What the rules leave of a row, in its order; written down without tensors."""
    best = max(row)
    weighs = {i: math.exp(x - best) for i, x in enumerate(row) if x >= best + choice.below and x > -math.inf}
    order = sorted(weighs, key=lambda i: -weighs[i])  # of equal ones the first
    order = order[: choice.top_k or None]
    total, before, kept = sum(weighs[i] for i in order), 0.0, []
    for i in order:
        if choice.top_p < 1 and before >= choice.top_p * total:
            break
        kept.append(i)
        before += weighs[i]
    return sorted(kept)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 1023, 1024, 1025, 2500, 50272])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_it_chooses_what_torch_chooses_where_nothing_is_cut(rows: int, width: int) -> None:
    numbers = random.Random(width)
    for seed in range(5):
        values = scores(rows, width, seed=seed)
        choices = [LIKELIEST if numbers.random() < 0.3 else Choice(numbers.random()) for _ in range(rows)]
        best, chosen = draw(values, choices)
        want_best, want = told(ByTorch().draw(values.clone(), choices))
        assert best.equal(want_best)
        assert chosen.equal(want)


CUTS = [
    Choice(0, top_k=1),
    Choice(0, top_k=7),
    Choice(0, top_k=300),
    Choice(0, top_k=10**6),
    Choice(0, top_p=1e-30),
    Choice(0, top_p=0.3),
    Choice(0, top_p=0.9),
    Choice(0, top_p=0.9999),
    Choice(0, below=math.log(0.05)),
    Choice(0, top_p=0.7, top_k=90),
    Choice(0, top_p=0.95, top_k=400, below=math.log(0.001)),
]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("width", [5, 64, 65, 1100, 3000])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_all_that_the_rules_leave_is_drawn_and_nothing_else(cut: Choice, width: int, spread: float) -> None:
    values = scores(1, width, seed=width, spread=spread)
    kept = left(values[0].tolist(), cut)
    weights = values[0, kept].softmax(-1).double()
    middles = weights.cumsum(0) - weights / 2
    shown = [n for n, w in enumerate(weights.tolist()) if w > 1e-6][:400]  # what rounding cannot hide
    choices = [cut._replace(uniform=min(float(middles[n]), LAST)) for n in shown]
    chosen = draw(values.expand(len(shown), -1), choices)[1]
    assert chosen.tolist() == [kept[n] for n in shown]
    edges = [cut._replace(uniform=u) for u in (0.0, LAST)]
    assert set(draw(values.expand(2, -1), edges)[1].tolist()) <= set(kept)


def test_of_many_equal_ones_the_first_stay() -> None:
    values = torch.zeros(1, 5000)
    values[0, 4000:] = 1.0
    # 1000 weigh 1 each and 4000 weigh 1 / e: 0.2 of that are 495 of the first
    for choice, last in ((Choice(LAST, top_k=300), 4299), (Choice(LAST, top_p=0.2), 4494)):
        assert int(draw(values, [choice])[1]) == last
        assert int(draw(values, [choice._replace(uniform=0.0)])[1]) == 4000


def test_a_token_that_weighs_nothing_is_never_drawn() -> None:
    for width in (3, 1024, 5000):
        for only in {0, 1, width // 2, width - 1}:
            values = torch.full((3, width), -torch.inf)
            values[:, only] = -5.0
            for cut in (Choice(0), *CUTS):
                choices = [cut._replace(uniform=u) for u in (0.0, 0.5, LAST)]
                assert draw(values, choices)[1].tolist() == [only] * 3
    values = scores(200, 3000)
    chosen = draw(values, [Choice(0.0), Choice(LAST)] * 100)[1]
    assert values.gather(1, chosen[:, None]).isfinite().all()


def test_each_token_is_drawn_as_often_as_it_weighs() -> None:
    num = 20000
    values = torch.tensor([0.0, -torch.inf, 1.0, -1.0, 2.0]).repeat(num, 1)
    chosen = draw(values, [Choice((i + 0.5) / num) for i in range(num)])[1]
    torch.testing.assert_close(chosen.bincount(minlength=5) / num, values[0].softmax(-1), atol=1e-4, rtol=0)


def test_of_equal_ones_the_first_is_the_best() -> None:
    values = torch.zeros(2, 4000)
    values[0, [1500, 1501, 3999]] = 7.0
    values[1, [3999, 3998]] = 7.0
    best, chosen = draw(values, [LIKELIEST] * 2)
    assert (best.tolist(), chosen.tolist()) == ([7.0, 7.0], [1500, 3998])


@pytest.mark.parametrize("at", [0, 1000, 1024, 3000])
def test_what_is_no_number_is_told(at: int) -> None:
    values = scores(4, 3001)
    values[1, at] = torch.nan
    values[2] = -torch.inf
    values[3, at] = torch.inf
    for choice in (LIKELIEST, Choice(0.5), Choice(0.5, top_p=0.5, top_k=3)):
        best, chosen = draw(values, [choice] * 4)
        assert best.isfinite().tolist() == [True, False, False, False]
        assert best[1].isnan()
        assert int(chosen.min()) >= 0
        assert int(chosen.max()) < 3001


def test_a_row_is_chosen_alike_among_any_others_and_by_any_number_of_threads() -> None:
    values, before = scores(100, 2500), torch.get_num_threads()
    choices = [Choice(0.4), Choice(0.7, top_p=0.9), Choice(0.2, top_p=0.8, top_k=40), LIKELIEST] * 25
    together = draw(values, choices)[1]
    assert [int(draw(values[i : i + 1], choices[i : i + 1])[1]) for i in range(100)] == together.tolist()
    try:
        torch.set_num_threads(1)
        assert draw(values, choices)[1].equal(together)
    finally:
        torch.set_num_threads(before)


def test_tokens_that_are_forbidden_or_banned_are_not_chosen() -> None:
    for chooser in (own(), ByTorch()):
        values = torch.tensor([9.0, 8.0, 7.0, 6.0, -torch.inf]).repeat(4, 1)
        choices = [
            LIKELIEST,
            Choice(-1.0, forbidden=(1,)),
            Choice(LAST, forbidden=(3,)),
            Choice(0.5, forbidden=(1, 2, 3)),
        ]
        best, chosen = told(chooser.draw(values, choices, banned=[0]))
        assert chosen[:3].tolist() == [1, 2, 2]
        assert best.tolist() == [8.0, 7.0, 8.0, -torch.inf], "of the last nothing is left"
