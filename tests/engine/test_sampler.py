"""Each row is sampled by its own parameters, at their edges too."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from metaseq_api.core import SamplingParams
from metaseq_api.engine.sampler import Row, Sampler
from metaseq_api.model.paths import score_kernels

VOCAB = 3000
SAMPLER = Sampler(num_tokens=VOCAB - 8, banned=[1])


@pytest.fixture(params=["torch", "own"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test by torch's operations, and by the kernel of our own where there is one."""
    if request.param == "own":
        if (by := score_kernels(torch.device("cpu"))) is None:
            pytest.skip("this machine has no AMX, or no C compiler")
        monkeypatch.setattr(sys.modules[__name__], "SAMPLER", Sampler(num_tokens=VOCAB - 8, banned=[1], by=by))


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def row(uniform: float = 0.5, forbidden: tuple[int, ...] = (), **params: object) -> Row:
    p = SamplingParams(**params)  # type: ignore[arg-type]
    return Row(params=p, uniform=uniform, top_p=p.top_p, forbidden=forbidden)


def choose(values: torch.Tensor, *rows: Row) -> list[int]:
    found = SAMPLER.sample(values, rows)
    return [s.token_id for s in found if s is not None]


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"top_p": 0}, {"top_k": 1}, {"top_p": 1e-46}, {"temperature": 1e-39}, {"temperature": 1e-300}],
)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_likeliest_token_is_taken_where_nothing_else_is_left(params: dict[str, float], uniform: float) -> None:
    values = logits()
    assert choose(values, row(uniform, **params)) == [int(values[0, : VOCAB - 8].argmax())]


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [
        (0, None, 0.5),
        (0, None, 0.9),
        (0, None, 0.999),
        (0, 5, 1.0),
        (0, 200, 0.9),
        (0, 2500, 1.0),
        (0, 2500, 0.9999),
        (0.02, None, 1.0),
        (0.3, None, 0.5),
        (1, None, 1.0),
        (0.0001, 300, 0.95),
        (0.05, 9, 0.6),
    ],
)
def test_only_what_hugging_faces_warpers_leave_is_drawn_from_and_all_of_it(
    min_p: float, top_k: int | None, top_p: float
) -> None:
    values = logits()
    scores = values[:, : VOCAB - 8].clone()
    scores[0, 1] = -torch.inf
    warpers: list[LogitsProcessor] = [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    for warper in [*warpers, TopPLogitsWarper(top_p)]:
        scores = warper(torch.tensor([[2]]), scores)  # type: ignore[arg-type]
    probs, ids = scores[0].softmax(-1).sort(descending=True)
    kept = int((probs > 0).sum())
    num = 400
    rows = [row((i + 0.5) / num, top_p=top_p, top_k=top_k, min_p=min_p) for i in range(num)]
    drawn = choose(values.expand(num, -1).clone(), *rows)
    assert set(drawn) <= set(ids[:kept].tolist())
    for rank in range(min(kept, 3)):
        assert drawn.count(int(ids[rank])) / num == pytest.approx(float(probs[rank]), abs=2.5 / num)


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    values = logits(rows=7)
    rows = [
        row(0.3),
        row(0.9, top_p=0.7),
        row(temperature=0),
        row(0.6, temperature=2.0, top_k=9),
        row(0.99, top_p=0.9999),
        row(0.1, temperature=0.2, top_p=0.5),
        row(0.8, min_p=0.05, top_k=70, top_p=0.95),
    ]
    together = choose(values, *rows)
    assert together == [choose(values[i : i + 1], r)[0] for i, r in enumerate(rows)]


def test_padding_rows_and_forbidden_ends_are_never_chosen() -> None:
    values = torch.full((1, VOCAB), -5.0)
    values[0, [1, 2, VOCAB - 1]] = torch.tensor([9.0, 8.0, 7.0])
    values[0, 77] = 0.0
    assert choose(values, row(temperature=0, forbidden=(2,))) == [77]
    assert choose(values, row(temperature=0)) == [2]


def test_a_row_that_is_not_numbers_is_told_and_alone() -> None:
    values = logits(rows=2)
    values[0, 5] = torch.nan
    bad, good = SAMPLER.sample(values, [row(temperature=0), row(temperature=0)])
    assert bad is None
    assert good is not None


def test_log_probabilities_are_the_models_after_temperature() -> None:
    values = logits()
    (scored,) = SAMPLER.sample(values, [row(0.4, temperature=0.5, top_p=0.9, logprobs=3)])
    want = (values / 0.5).log_softmax(-1)[0]
    assert scored is not None
    assert scored.logprob == pytest.approx(float(want[scored.token_id]), abs=1e-5)
    assert [i for i, _ in scored.top] == want.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("waits", "params"),
    [
        (1, {"temperature": 0}),
        (1, {"temperature": 0, "logprobs": 5}),
        (1, {"temperature": 1.3, "min_p": 0.1, "logprobs": 0}),
        (2, {"top_p": 0.5, "top_k": 20, "logprobs": 2}),
    ],
)
def test_a_step_hands_over_its_numbers_in_one_copy_and_asks_once_more_for_top_p(
    waits: int, params: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[torch.Size] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> object:
        copies.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(sys.modules[__name__], "SAMPLER", Sampler(num_tokens=VOCAB - 8, banned=[1]))  # as on a GPU
    choose(logits(rows=4), *(row(0.1 * i, **params) for i in range(3)), row(temperature=0, forbidden=(2, 3)))
    assert len(copies) == waits


def test_more_may_be_asked_for_than_there_is() -> None:
    values = logits()
    (found,) = SAMPLER.sample(values, [row(0.3, top_k=10**400, logprobs=5)])
    (want,) = SAMPLER.sample(values, [row(0.3, logprobs=5)])
    assert found == want
    few = Sampler(num_tokens=3, banned=[1], by=SAMPLER._by)
    (found,) = few.sample(values[:, :3].contiguous(), [row(temperature=0, logprobs=5)])
    assert found is not None
    assert len(found.top) == 3
