"""Log-probabilities by the kernel of our own, beside torch's in fp64."""

from __future__ import annotations

import pytest
import torch
from support.own_kernels import needs_own, own
from torch import Tensor

from metaseq_api.engine.choosing import ByTorch

pytestmark = needs_own


def scores(rows: int, width: int) -> Tensor:
    """All different, rows further apart than they are wide."""
    generator = torch.Generator().manual_seed(width)
    order = torch.stack([torch.randperm(width + 8, generator=generator) for _ in range(rows)])
    return (order * (20 / width) - 7)[:, :width]


@pytest.mark.parametrize("most", [0, 1, 5, 100])
@pytest.mark.parametrize("width", [1, 16, 100, 1025, 50272])
def test_it_rates_as_torch_does(width: int, most: int) -> None:
    values, most = scores(7, width), min(most, width)
    chosen = torch.arange(7) * 31 % width
    for rows in (range(7), [5, 0, 3], [6]):
        found = own().rate(values, rows, chosen, most)
        want = ByTorch().rate(values.double(), rows, chosen, most)
        logprobs = [0, *range(2, 2 + most)]
        torch.testing.assert_close(found[:, logprobs], want[:, logprobs], atol=2e-6, rtol=2e-7)
        assert found[:, 1].equal(want[:, 1])
        assert found[:, 2 + most :].equal(want[:, 2 + most :])
        assert found[:, 0].float().double().equal(found[:, 0]), "an fp32 number, so that JSON has no more digits"


@pytest.mark.parametrize("order", [1, -1])
def test_rising_and_falling_scores_are_found_too(order: int) -> None:
    values = torch.arange(3000.0)[None] * order
    ids = own().rate(values, [0], torch.tensor([0]), 4)[0, 6:].tolist()
    assert ids == ([2999, 2998, 2997, 2996] if order > 0 else [0, 1, 2, 3])


def test_of_equal_ones_the_first_come_first_and_none_is_above() -> None:
    found = own().rate(torch.zeros(1, 500), [0], torch.tensor([499]), 3)[0]
    assert found[1] == 1
    assert found[5:].tolist() == [0, 1, 2]
    torch.testing.assert_close(found[0].item(), -6.2146080984)  # log 500


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_told(wrong: float) -> None:
    values = scores(3, 1500)
    values[1, 1200] = wrong
    values[2] = -torch.inf
    found = own().rate(values, range(3), torch.tensor([3, 3, 3]), 5)
    assert found[0].isfinite().all()
    assert found[1:, 0].isnan().all()
    assert (found[:, 7:] >= 0).all()
    assert (found[:, 7:] < 1500).all()
