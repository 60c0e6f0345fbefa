"""When all layers are run in one call. That its bits are those of layer after layer: `test_same_bits`."""

from __future__ import annotations

import pytest
import torch
from support.own_kernels import needs_own
from support.rank_bits import DTYPES, SHAPES
from support.steps import Driver

from metaseq_api.core import ModelConfig
from metaseq_api.model.weights import RandomWeights

TOKENS, BLOCKS = list(range(5, 45)), list(range(6))


def driver(shape: str, dtype: torch.dtype, **more: object) -> Driver:
    sizes = {"num_layers": 3, "vocab_size": 160, "max_positions": 192} | SHAPES[shape] | {"block_size": 8} | more
    sizes.pop("block_size")
    config = ModelConfig(**sizes)  # type: ignore[arg-type]
    return Driver(config, RandomWeights(config, std=0.08), dtype=dtype)


@needs_own
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cpu_with_kernels_of_our_own_runs_all_layers_in_one_call(shape: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        model = driver(shape, dtype, bias=bias).model
        assert model.stack is not None


@needs_own
def test_without_biases_its_bits_are_those_of_layer_after_layer() -> None:
    own = driver("heads of 64", torch.float32, bias=False)
    (in_one,) = own.step((TOKENS, 0, BLOCKS))
    own.model.stack = None
    assert torch.equal(in_one, own.step((TOKENS, 0, BLOCKS))[0])


@needs_own
def test_torchs_activation_is_not_taken_for_relu() -> None:
    assert driver("heads of 64", torch.float32, activation="gelu").model.stack is None
