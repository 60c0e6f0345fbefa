"""Weights lie in memory as the kernels of our own read them, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.own_kernels import needs_own, needs_vectors, own
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.itemsize == 4 else torch.int16)


def filled_up(weight: Tensor, panel: int) -> Tensor:
    return torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % panel))


@needs_own
@pytest.mark.parametrize("shape", [(32, 32), (1, 64), (33, 96), (100, 2080)], ids=str)
def test_tiles_have_pairs_of_sixteen_outputs_side_by_side(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = own().pack(weight, torch.bfloat16)
    tiles = packed.view(-1, shape[1] // 32, 2, 16, 16, 2)  # panel, step, half, pair, output, number of the pair
    assert bits(tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, shape[1])).equal(bits(filled_up(weight, 32)))


@needs_own
def test_every_number_in_fp16_is_rounded_as_torch_does() -> None:
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(-1, 32)
    packed, want = own().pack(weight, torch.bfloat16), own().pack(weight.bfloat16(), torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert packed.isnan().equal(want.isnan())
    assert packed.isnan().sum() == 2 * (2**10 - 1)
    assert bits(packed.nan_to_num()).equal(bits(want.nan_to_num()))


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (1, 1), (50, 70), (130, 33), (65, 768)], ids=str)
def test_columns_have_sixty_four_outputs_side_by_side(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = own().pack(weight, torch.float32)
    assert packed.dtype == dtype
    columns = packed.flatten().view(-1, shape[1], 64)  # panel, input, output
    assert bits(columns.transpose(1, 2).reshape(-1, shape[1])).equal(bits(filled_up(weight, 64)))
