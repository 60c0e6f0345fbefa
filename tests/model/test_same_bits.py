"""A token's numbers depend on the tokens before it and on which of these were generated, bit by bit on nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import rank_bits
from support.rank_bits import DTYPES, SHAPES, check
from support.steps import Driver
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.model import attention, opt, paths
from metaseq_api.model.decode import alike
from metaseq_api.model.weights import RandomWeights
from metaseq_api.parallel import layers
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.parallel.layers import Linear

MOST = 520


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only torch's own operations, as where there is no compiler."""
    for module in (layers, opt, paths):
        monkeypatch.setattr(module, "native_for", lambda dtype, device: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["heads of 64", "heads of 80, blocks of 32", "heads of 8"])
def test_bits_depend_on_no_more_where_torch_serves_alone(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_native(monkeypatch)
    check(shape, dtype, ParallelContext())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_chunks_neighbours_shared_heads_or_where_blocks_lie(
    shape: str, dtype: torch.dtype
) -> None:
    check(shape, dtype, ParallelContext())


@pytest.mark.parametrize(
    ("num_ranks", "node", "slot"), [(2, "", 1 << 20), (2, "here", 1 << 13), (4, "here", 1 << 20)], ids=str
)
def test_bits_of_several_ranks_depend_on_no_more(num_ranks: int, node: str, slot: int, tmp_path: Path) -> None:
    """Over sockets, or through the memory of one node: in pieces of a slot where a step's rows do not fit one."""
    script = Path(rank_bits.__file__)
    env = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    about = (str(num_ranks), str(tmp_path / "store"), node, str(slot))
    ranks = [subprocess.Popen([sys.executable, str(script), str(r), *about], env=env) for r in range(num_ranks)]
    assert [p.wait(120) for p in ranks] == [0] * num_ranks


def test_bits_do_not_depend_on_how_many_generated_tokens_are_done_together(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    monkeypatch.setattr(attention, "MOST", 7)
    check("heads of 8", torch.float32, ParallelContext())


@pytest.mark.parametrize("block_size", [1, 3, 5, 8])
def test_bits_of_the_first_tokens_do_not_depend_on_a_longer_neighbour(block_size: int) -> None:
    config = ModelConfig(num_layers=2, hidden_dim=64, num_heads=4, ffn_dim=128, vocab_size=160, max_positions=64)
    driver = Driver(config, RandomWeights(config, std=0.2), num_blocks=100, block_size=block_size)
    long, short = [2, *range(9, 60)], [2, *range(30, 50)]
    there, here = list(range(70, 70 - len(long), -1)), list(range(71, 92))
    driver.step((long[:-1], 0, there))
    for n in range(1, len(short)):
        driver.step((short[:n], n - 1, here))
        (alone,) = driver.step((short[: n + 1], n, here))
        beside, _ = driver.step((short[: n + 1], n, here), (long, len(long) - 1, there))
        assert torch.equal(alone, beside), n


@pytest.mark.parametrize("alone", [False, True], ids=["", "torch alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (2048, 512), (1024, 512), (64, 192)], ids=str)
def test_a_linear_layer_gives_a_row_the_same_bits_among_any_others(
    shape: tuple[int, int], dtype: torch.dtype, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alone:
        without_native(monkeypatch)
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    # halves that cancel, so that sums are small beside their terms and any other order of summing shows
    half = normal(shape[1], shape[0] // 2)
    weight = torch.cat([half, half * (1 + normal(*half.shape) * 0.002)], 1) * 0.02
    layer = Linear(ParallelContext(), dtype)
    layer.keep(weight, normal(shape[1]) * 0.001)
    x, residual = normal(MOST, shape[0] // 2), normal(MOST, shape[1]) * 0.001
    x = torch.cat([x, -x], 1)
    plain, added = layer(x, "relu"), layer.add_to(residual, x)
    for num in (1, 2, 3, 4, 5, 8, 17, 32, 33, 37, 64, 129, 300):
        at = random.Random(num).randrange(MOST - num)
        rows = slice(at, at + num)
        assert torch.equal(layer(x[rows], "relu"), plain[rows]), num
        assert torch.equal(layer.add_to(residual[rows], x[rows]), added[rows]), num


def test_whether_products_are_alike_is_found_out_and_not_asked_of_a_gpu() -> None:
    assert alike(torch.float32, 32, 64, torch.device("cuda"))
    assert alike(torch.float32, 32, 64, torch.device("cpu")) in (True, False)
