"""A whole model whose steps go by the Triton kernels (interpreted) gives Hugging Face's logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.hf_opt import config_of, logits, metaseq_weights, tiny_opt
from support.plain_weights import lie_plain

from metaseq_api.kernels import have_triton

if not have_triton():
    pytest.skip("triton is not installed; torch's CUDA builds bring it", allow_module_level=True)

from metaseq_api.bench import gpu_parity
from metaseq_api.core import Batch, BatchItem
from metaseq_api.kernels.gpu import kernels
from metaseq_api.model.cache import KVCache
from metaseq_api.model.decode_step import DecodeSteps
from metaseq_api.model.opt import OPT
from metaseq_api.model.paged import plan_paged
from metaseq_api.model.weights import TensorWeights
from metaseq_api.parallel.context import ParallelContext

BLOCK = 16


@pytest.mark.parametrize("variant", ["pre-norm", "head width 80", "350m"])  # all are in test_paged, uninterpreted
def test_a_chunk_beside_a_single_token_and_then_decode_steps(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lie_plain(monkeypatch)
    hf = tiny_opt(variant)
    model = OPT(config_of(hf), ParallelContext(), torch.float32)
    model.load(TensorWeights(metaseq_weights(hf)))
    cache = KVCache(model.config, ParallelContext(), torch.float32, num_blocks=12, block_size=BLOCK)
    steps = DecodeSteps(model, cache, kernels(), capture=False)
    texts, tables = ([2, *range(9, 48)], [2, *range(60, 94)]), ((7, 3, 9), (0, 11, 4))
    done, got = [0, 0], ([], [])  # type: tuple[list[int], tuple[list[torch.Tensor], list[torch.Tensor]]]
    for nums in ((36, 20), (1, 12), (1, 1), (1, 0), (0, 1), (1, 1)):
        items = tuple(
            BatchItem(
                start=start,
                token_ids=tuple(text[start : start + num]),
                block_ids=table[: -(-(start + num) // BLOCK)],
                num_logits=num,
                num_prompt=0 if num == 1 else num,
            )
            for text, table, start, num in zip(texts, tables, done, nums, strict=True)
            if num
        )
        batch = Batch(items=items)
        with torch.inference_mode():
            plan = plan_paged(batch, cache, torch.device("cpu"), kernels())
            found = steps.run(batch) if steps.takes(batch) else model.logits(model(plan, cache))
        assert found is not None
        for s, part in enumerate(found.clone().split(nums)):
            got[s].append(part)
            done[s] += nums[s]
    for text, parts in zip(texts, got, strict=True):
        torch.testing.assert_close(torch.cat(parts), logits(hf, text), atol=1e-4, rtol=0)


def test_the_gpu_checks_own_comparisons_hold_for_them() -> None:
    checks = list(gpu_parity.alone(kernels(), torch.device("cpu"), {"fp32": (64,), "bf16": (80,)}, inputs=160))
    assert len(checks) == 2 * (3 + 4)
    assert [check for check in checks if not check.passed] == []


def test_the_gpu_checks_own_comparisons_notice_a_kernel_that_errs() -> None:
    ours = kernels()
    wrong = replace(ours, add_norm=lambda x, y, norm: ours.add_norm(x, y, norm._replace(eps=0.05)))
    failed = [c.what for c in gpu_parity.alone(wrong, torch.device("cpu"), {"fp32": ()}, inputs=160) if not c.passed]
    assert failed == ["norm of a sum, fp32"]
