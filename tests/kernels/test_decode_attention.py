"""The Triton kernel gives what plain torch gives, over random blocks, lengths, widths and parts (interpreted)."""

from __future__ import annotations

import random

import pytest
import torch

from metaseq_api.kernels import have_triton, reference

if not have_triton():
    pytest.skip("triton is not installed; torch's CUDA builds bring it", allow_module_level=True)

from metaseq_api.kernels.decode_attention import decode_attention, num_splits

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Case:
    """A pool with random contents, and sequences of the given lengths whose blocks lie anywhere in it."""

    def __init__(
        self,
        contexts: list[int],
        *,
        heads: int = 3,
        width: int = 64,
        size: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        g = torch.Generator().manual_seed(len(contexts) + width)
        num, widest = len(contexts), max(-(-c // size) for c in contexts) + 1
        pool = random.Random(width).sample(range(num * widest + 3), num * widest)
        self.tables = torch.tensor(pool, dtype=torch.int32).view(num, widest)
        shape = (num * widest + 3, heads, size, width)
        self.keys, self.values = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.rows = torch.randperm(num + 2, generator=g)[:num].to(torch.int32)
        qkv = torch.randn(num + 2, 3, heads, width, generator=g).to(dtype)
        self.q, self.k, self.v = qkv.unbind(1)

    def run(self, kernel: reference.DecodeAttention, **more: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values, out = self.keys.clone(), self.values.clone(), self.q.flatten(1).contiguous().zero_()
        kernel(
            self.q,
            self.k,
            self.v,
            keys,
            values,
            rows_B=self.rows,
            tables_BN=self.tables,
            contexts_B=self.contexts,
            scale=self.q.shape[2] ** -0.5,
            out_TX=out,
            **more,
        )
        return out, keys, values

    def check(self, splits: int) -> None:
        want, got = self.run(reference.decode_attention), self.run(decode_attention, splits=splits)
        atol = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(got[0], want[0], atol=atol, rtol=0)
        for cache, theirs in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(cache, theirs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_every_head_width_gives_what_plain_torch_gives(width: int, splits: int) -> None:
    Case([1, 70, 300], width=width).check(splits)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", [1, 4])
def test_every_dtype_gives_what_plain_torch_gives(dtype: torch.dtype, splits: int) -> None:
    Case([33, 2, 129, 64], dtype=dtype).check(splits)


@pytest.mark.parametrize("size", [8, 16, 32, 48, 64])
def test_blocks_of_any_size_are_read(size: int) -> None:
    Case([size, size + 1, size - 1, 3 * size + 5, 200], size=size).check(2)


@pytest.mark.parametrize("splits", [1, 16])
def test_lengths_at_the_edges_of_tiles_and_parts(splits: int) -> None:
    Case([1, 2, 128, 129, 130, 256, 257, 258], heads=1).check(splits)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_that_pads_the_batch_gives_zeros_and_writes_nothing(splits: int) -> None:
    case = Case([40, 5, 9])
    case.contexts[1] = 0
    case.tables[1] = 0
    case.check(splits)
    out, keys, _ = case.run(decode_attention, splits=splits)
    assert not out[case.rows[1]].any()
    assert int((keys != case.keys).flatten(1).any(1).sum()) == 2


@pytest.mark.parametrize("splits", [1, 4])
def test_sequences_that_share_a_head_read_the_same_blocks(splits: int) -> None:
    case = Case([100, 97, 120])
    case.tables[1:, :3] = case.tables[0, :3]
    case.check(splits)


@pytest.mark.parametrize("splits", [1, 4])
def test_what_lies_beyond_a_context_is_not_read_though_it_be_nan(splits: int) -> None:
    case = Case([40, 33])
    for b, context in enumerate((40, 33)):
        block, offset = int(case.tables[b, 1]), context - 33
        case.keys[block, :, offset:], case.values[block, :, offset:] = torch.nan, torch.nan
    case.check(splits)
    assert case.run(decode_attention, splits=splits)[0].isfinite().all()


@pytest.mark.parametrize("splits", [1, 4])
def test_a_nan_among_the_keys_reaches_its_own_sequence_alone(splits: int) -> None:
    case = Case([40, 33])
    case.keys[int(case.tables[0, 0]), :, 3] = torch.nan
    out = case.run(decode_attention, splits=splits)[0]
    assert out[case.rows[0]].isnan().all()
    assert out[case.rows[1]].isfinite().all()


def test_contexts_are_cut_the_less_the_more_sequences_there_are() -> None:
    assert [num_splits(b, 32) for b in (1, 2, 4, 8, 16, 256)] == [16, 8, 4, 2, 1, 1]
