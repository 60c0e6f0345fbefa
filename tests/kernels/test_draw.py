"""Tokens chosen by the kernel of our own: the same that torch's operations choose, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from metaseq_api.engine.sampler import GREEDY, _pick
from metaseq_api.kernels.native import Native, native

OWN = native()
pytestmark = pytest.mark.skipif(OWN is None, reason="this machine has no AMX, or no C compiler")
LAST = 1 - 2**-53


def own() -> Native:
    assert OWN is not None
    return OWN


def scores(rows: int, width: int, *, seed: int = 0) -> Tensor:
    """Some of them -inf, rows further apart than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, width + 24, generator=generator) * 3)[:, :width]
    values[torch.rand(rows, width, generator=generator) < 0.2] = -torch.inf
    values[:, seed % width] = 0.25
    return values


@pytest.mark.parametrize("width", [1, 15, 16, 17, 1023, 1024, 1025, 2500, 50272])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_it_chooses_what_torch_chooses(rows: int, width: int) -> None:
    numbers = random.Random(width)
    for seed in range(5):
        values = scores(rows, width, seed=seed)
        uniforms = [GREEDY if numbers.random() < 0.3 else numbers.random() for _ in range(rows)]
        best, chosen = own().draw(values, uniforms)
        want_best, want = _pick(values, uniforms)
        assert best.equal(want_best)
        assert chosen.equal(want)


def test_a_token_that_weighs_nothing_is_never_drawn() -> None:
    for width in (3, 1024, 5000):
        for only in {0, 1, width // 2, width - 1}:
            values = torch.full((3, width), -torch.inf)
            values[:, only] = -5.0
            assert own().draw(values, [0.0, 0.5, LAST])[1].tolist() == [only] * 3
    values = scores(200, 3000)
    chosen = own().draw(values, [0.0, LAST] * 100)[1]
    assert values.gather(1, chosen[:, None]).isfinite().all()


def test_each_token_is_drawn_as_often_as_it_weighs() -> None:
    num = 20000
    values = torch.tensor([0.0, -torch.inf, 1.0, -1.0, 2.0]).repeat(num, 1)
    chosen = own().draw(values, [(i + 0.5) / num for i in range(num)])[1]
    torch.testing.assert_close(chosen.bincount(minlength=5) / num, values[0].softmax(-1), atol=1e-4, rtol=0)


def test_of_equal_ones_the_first_is_the_best() -> None:
    values = torch.zeros(2, 4000)
    values[0, [1500, 1501, 3999]] = 7.0
    values[1, [3999, 3998]] = 7.0
    best, chosen = own().draw(values, [GREEDY] * 2)
    assert (best.tolist(), chosen.tolist()) == ([7.0, 7.0], [1500, 3998])


@pytest.mark.parametrize("at", [0, 1000, 1024, 3000])
def test_what_is_no_number_is_told(at: int) -> None:
    values = scores(4, 3001)
    values[1, at] = torch.nan
    values[2] = -torch.inf
    values[3, at] = torch.inf
    for uniform in (GREEDY, 0.5):
        best, chosen = own().draw(values, [uniform] * 4)
        assert best.isfinite().tolist() == [True, False, False, False]
        assert best[1].isnan()
        assert int(chosen.min()) >= 0
        assert int(chosen.max()) < 3001


def test_a_row_is_chosen_alike_among_any_others_and_by_any_number_of_threads() -> None:
    values, before = scores(100, 2500), torch.get_num_threads()
    uniforms = [random.Random(1).random()] * 100
    together = own().draw(values, uniforms)[1]
    assert [int(own().draw(values[i : i + 1], uniforms[:1])[1]) for i in range(100)] == together.tolist()
    try:
        torch.set_num_threads(1)
        assert own().draw(values, uniforms)[1].equal(together)
    finally:
        torch.set_num_threads(before)
