"""A step planned and attended as a GPU does it gives Hugging Face's logits; here with plain torch for its kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.hf_opt import VARIANTS, config_of, logits, metaseq_weights, tiny_opt
from support.plain_weights import lie_plain
from transformers import OPTForCausalLM

from metaseq_api.core import Batch, BatchItem
from metaseq_api.kernels import reference
from metaseq_api.model.cache import KVCache
from metaseq_api.model.decode_step import DecodeStep, DecodeSteps, ladder
from metaseq_api.model.opt import OPT
from metaseq_api.model.paged import plan_paged
from metaseq_api.model.paths import gpu_kernels, plan
from metaseq_api.model.weights import TensorWeights
from metaseq_api.parallel.context import ParallelContext

CPU = torch.device("cpu")
SIZE = 8
Fed = tuple[list[int], int, list[int]]


def tokens(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(4, 160, (n - 1,), generator=generator).tolist()]


class Model:
    """Ours, with every way to run a step."""

    def __init__(self, variant: str = "pre-norm", dtype: torch.dtype = torch.float32) -> None:
        self.hf: OPTForCausalLM = tiny_opt(variant)
        self.model = OPT(config_of(self.hf), ParallelContext(), dtype)
        self.model.load(TensorWeights(metaseq_weights(self.hf)))
        self.cache = KVCache(self.model.config, ParallelContext(), dtype, num_blocks=40, block_size=SIZE)
        for pool in (*self.cache.keys, *self.cache.values):
            pool.fill_(torch.nan)  # what former owners left must never be read

    def batch(self, *fed: Fed) -> Batch:
        """(all tokens so far, how many the cache holds, blocks) of each sequence; logits of every fed token."""
        return Batch(
            items=tuple(
                BatchItem(
                    start=cached,
                    token_ids=tuple(ids[cached:]),
                    block_ids=tuple(blocks[: -(-len(ids) // SIZE)]),
                    num_logits=len(ids) - cached,
                    num_prompt=0 if len(ids) - cached == 1 else len(ids) - cached,
                )
                for ids, cached, blocks in fed
            )
        )

    @torch.inference_mode()
    def paged(self, *fed: Fed) -> list[torch.Tensor]:
        batch = self.batch(*fed)
        found = self.model.logits(self.model(plan_paged(batch, self.cache, CPU, reference.PLAIN), self.cache))
        assert found is not None
        return list(found.split([i.num_logits for i in batch.items]))

    @torch.inference_mode()
    def plain(self, *fed: Fed) -> torch.Tensor:
        found = self.model.logits(self.model(plan(self.batch(*fed), self.cache, CPU, None), self.cache))
        assert found is not None
        return found

    def expect(self, got: torch.Tensor, ids: list[int]) -> None:
        torch.testing.assert_close(got, logits(self.hf, ids)[-len(got) :], atol=1e-4, rtol=0)


@pytest.fixture(params=["packed", "plain"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as a CPU packs them, and as they lie on a GPU, where one row is not multiplied by torch."""
    if request.param == "plain":
        lie_plain(monkeypatch)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_single_tokens_give_hugging_faces_logits(variant: str) -> None:
    ours, ids, blocks = Model(variant), tokens(41), [5, 2, 30, 8, 11, 12]
    got: list[torch.Tensor] = []
    for upto in (7, 8, 9, 10, 25, 40, 41):
        got += ours.paged((ids[:upto], sum(map(len, got)), blocks))
    ours.expect(torch.cat(got), ids)


def test_whole_prompts_chunks_and_single_tokens_share_a_step_in_any_order() -> None:
    ours = Model()
    a, b, c, d = tokens(30, 1), tokens(17, 2), tokens(9, 3), tokens(26, 4)
    blocks = ([0, 1, 2, 3], [31, 4, 30], [17, 5], [20, 21, 9, 22])
    for ids, upto, where in ((a, 29, blocks[0]), (b, 16, blocks[1]), (d, 12, blocks[3])):
        ours.paged((ids[:upto], 0, where))
    got = ours.paged((c, 0, blocks[2]), (a, 29, blocks[0]), (d, 12, blocks[3]), (b, 16, blocks[1]))
    for found, ids in zip(got, (c, a, d, b), strict=True):
        ours.expect(found, ids)


def test_single_rows_are_normed_and_multiplied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lie_plain(monkeypatch)
    asked: list[bool] = []

    def one_row(*args: torch.Tensor, norm: reference.NormWeights | None = None, relu: bool = False) -> torch.Tensor:
        asked.append(norm is not None)
        return reference.row_linear(*args, norm=norm, relu=relu)

    ours, ids, blocks = Model(), tokens(12), [5, 2]
    ours.paged((ids[:11], 0, blocks))
    monkeypatch.setattr(reference, "PLAIN", replace(reference.PLAIN, row_linear=one_row))
    ours.expect(ours.paged((ids, 11, blocks))[0], ids)
    assert asked == [True, False, True, False] * ours.model.config.num_layers


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num", [1, 3, 4, 5])
def test_a_decode_step_of_fixed_buffers_gives_what_the_plain_way_gives(variant: str, num: int) -> None:
    fixed, plain = Model(variant), Model(variant)
    steps = DecodeSteps(fixed.model, fixed.cache, reference.PLAIN, capture=False)
    sequences = [(tokens(6 + 5 * i, i), [8 * i + j for j in (3, 0, 6, 1, 2)]) for i in range(num)]
    for ids, blocks in sequences:
        fixed.paged((ids, 0, blocks))
        plain.plain((ids, 0, blocks))
    for _ in range(12):
        sequences = [([*ids, 7 + len(ids)], blocks) for ids, blocks in sequences]
        fed = [(ids, len(ids) - 1, blocks) for ids, blocks in sequences]
        batch = fixed.batch(*fed)
        assert steps.takes(batch)
        torch.testing.assert_close(steps.run(batch), plain.plain(*fed), atol=2e-5, rtol=0)
    for (ids, _), found in zip(sequences, steps.run(batch), strict=True):
        fixed.expect(found[None], ids)


def test_a_decode_step_is_fed_what_was_drawn_though_nobody_has_read_it() -> None:
    fixed = Model()
    drawn = torch.tensor([11, 50, 7, 0], dtype=torch.int32)
    steps = DecodeSteps(fixed.model, fixed.cache, reference.PLAIN, drawn, capture=False)
    sequences = [(tokens(9 + i, i), [4 * i, 4 * i + 1]) for i in range(3)]
    for ids, blocks in sequences:
        fixed.paged((ids, 0, blocks))
    for fed, meant in (((-1, 60, -2), (11, 60, 50)), ((-3, -3, 9), (7, 7, 9))):
        batch = fixed.batch(*[([*ids, t], len(ids), blocks) for (ids, blocks), t in zip(sequences, fed, strict=True)])
        found = steps.run(batch)
        sequences = [([*ids, t], blocks) for (ids, blocks), t in zip(sequences, meant, strict=True)]
        for row, (ids, _) in zip(found, sequences, strict=True):
            fixed.expect(row[None], ids)


def test_rows_that_pad_a_decode_step_touch_no_cache_though_a_larger_step_ran_before() -> None:
    ours = Model()
    step = DecodeStep(ours.model, ours.cache, reference.PLAIN, 4)
    sequences = [(tokens(9, i), [4 * i, 4 * i + 1]) for i in range(4)]
    for ids, blocks in sequences:
        ours.paged((ids[:8], 0, blocks))
    step.run(ours.batch(*[(ids, 8, blocks) for ids, blocks in sequences]))
    before = [keys.clone() for keys in ours.cache.keys]
    ids, blocks = [*sequences[2][0], 50], sequences[2][1]
    ours.expect(step.run(ours.batch((ids, 9, blocks))), ids)
    for keys, former in zip(ours.cache.keys, before, strict=True):
        changed = (keys != former) & ~(keys.isnan() & former.isnan())
        assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [blocks[1]]


def test_prompts_and_steps_without_logits_are_left_to_the_other_way() -> None:
    ours = Model()
    steps = DecodeSteps(ours.model, ours.cache, reference.PLAIN, capture=False)
    single = BatchItem(start=3, token_ids=(5,), block_ids=(0,), num_logits=1, num_prompt=0)
    silent = BatchItem(start=3, token_ids=(5,), block_ids=(0,), num_logits=0, num_prompt=0)
    longer = BatchItem(start=0, token_ids=(5, 6), block_ids=(0,), num_logits=1, num_prompt=2)
    assert steps.takes(Batch(items=(single,) * 256))
    assert not steps.takes(Batch(items=(single,) * 257))
    assert not steps.takes(Batch(items=(single, silent)))
    assert not steps.takes(Batch(items=(single, longer)))


def test_the_ladder_ends_where_the_largest_batch_fits() -> None:
    assert ladder(1) == [1]
    assert ladder(5) == [1, 2, 4, 8]
    assert ladder(1000) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_a_cpu_goes_the_plain_way() -> None:
    assert gpu_kernels(CPU) is None
