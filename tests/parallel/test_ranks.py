"""Two and four gloo ranks compute what one computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import late_rank, rank_logits
from support.hf_opt import config_of, metaseq_weights, tiny_opt
from support.steps import Driver

from metaseq_api.model.weights import TensorWeights
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.parallel.layers import ColumnLinear, RowLinear, VocabEmbedding


@pytest.mark.parametrize("nodes", [["one"], ["one", "two"]], ids=["one node", "two nodes"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_give_one_ranks_logits(size: int, nodes: list[str], tmp_path: Path) -> None:
    script, out = Path(rank_logits.__file__), tmp_path / "logits.pt"
    hf = [tiny_opt(variant) for variant, _ in rank_logits.CASES]
    rank_logits.save(tmp_path, [(config_of(m), metaseq_weights(m)) for m in hf])
    env = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = []
    for r in range(size):
        about = [str(r), str(size), str(tmp_path / "store"), str(out), nodes[r % len(nodes)], str(len(nodes) == 1)]
        ranks.append(subprocess.Popen([sys.executable, str(script), *about], env=env))
    assert [p.wait(120) for p in ranks] == [0] * size
    for model, (_, dtype), got in zip(hf, rank_logits.CASES, torch.load(out), strict=True):
        driver = Driver(config_of(model), TensorWeights(metaseq_weights(model)), dtype=dtype)
        for found, want in zip(got, (rank_logits.run(driver), rank_logits.run_fixed(driver)), strict=True):
            # bf16: partial sums are rounded to 8 bits, then added up (of four: 0.023 off; either 0.02 off fp32)
            close = 1e-4 if dtype is torch.float32 else 6 * torch.finfo(dtype).eps * float(want.std())
            torch.testing.assert_close(found, want, atol=close, rtol=0)


def test_a_rank_may_come_later_than_a_collective_may_take(tmp_path: Path) -> None:
    script = Path(late_rank.__file__)
    env = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(r), str(tmp_path / "store"), str(late_s)], env=env)
        for r, late_s in ((0, 0), (1, 4))
    ]
    assert [p.wait(60) for p in ranks] == [0, 0]


class Recorder:
    """A Source that remembers which bytes were asked for."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value, self.asked = value, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        self.asked += self.value.narrow(dim, start, stop - start).numel()
        return self.value.narrow(dim, start, stop - start)


def test_each_rank_reads_only_what_it_keeps() -> None:
    weight, bias = torch.randn(16, 8), torch.randn(16)
    for kind, share, bias_share in ((ColumnLinear, 4, 4), (RowLinear, 4, 16)):
        for rank in range(4):
            w, b = Recorder(weight), Recorder(bias)
            layer = kind(ParallelContext(rank=rank, tensor_size=4), torch.float16)
            layer.load([w], [b])
            assert w.asked == weight.numel() // share
            assert b.asked == (bias.numel() * bias_share // 16 if kind is ColumnLinear or rank == 0 else 0)
    table = Recorder(weight)
    VocabEmbedding(ParallelContext(rank=3, tensor_size=4), torch.float16).load(table, None)
    assert table.asked == weight.numel() // 4


def test_fused_columns_keep_each_sources_own_rows() -> None:
    q, k = torch.arange(8.0).reshape(4, 2), torch.arange(8.0, 16.0).reshape(4, 2)
    layer = ColumnLinear(ParallelContext(rank=1, tensor_size=2), torch.float16)
    layer.load([Recorder(q), Recorder(k)], [])
    assert layer.weight.tolist() == [[4, 5], [6, 7], [12, 13], [14, 15]]
