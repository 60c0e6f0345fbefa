"""The Triton kernel for one row gives what plain torch gives (interpreted)."""

from __future__ import annotations

import pytest
import torch

from metaseq_api.kernels import have_triton, reference

if not have_triton():
    pytest.skip("triton is not installed; torch's CUDA builds bring it", allow_module_level=True)

from metaseq_api.kernels.row_linear import row_linear

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def made(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(outputs)
    shapes = ((1, inputs), (outputs, inputs), (outputs,), (1, outputs))
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 64), (130, 2500), (33, 1024), (6, 96)])
def test_any_size_gives_what_plain_torch_gives(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, w, b, r = made(outputs, inputs, dtype)
    torch.testing.assert_close(
        row_linear(x, w, b, r), reference.row_linear(x, w, b, r), atol=TOLERANCE[dtype], rtol=1e-2
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_bias_relu_and_residual_each_count_or_do_not(bias: bool, residual: bool, relu: bool) -> None:
    x, w, b, r = made(40, 80)
    given = (x, w, b if bias else None, r if residual else None)
    torch.testing.assert_close(
        row_linear(*given, relu=relu), reference.row_linear(*given, relu=relu), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 512, 4), (8, 64, 2), (16, 2048, 8)])
def test_no_shape_of_the_programs_changes_the_result(shape: tuple[int, int, int]) -> None:
    x, w, b, r = made(50, 700)
    torch.testing.assert_close(row_linear(x, w, b, r, shape=shape), reference.row_linear(x, w, b, r), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 64), (30, 2500), (33, 1024)])
def test_a_row_may_be_normed_first(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, w, b, r = made(outputs, inputs, dtype)
    weight, bias = (5 * t[0] for t in made(2, inputs, dtype)[1].split(1))
    norm = reference.NormWeights(weight, bias, 1e-5)
    ours = row_linear(3 * x + 2, w, b, r, norm=norm, relu=True)
    theirs = reference.row_linear(3 * x + 2, w, b, r, norm=norm, relu=True)
    # the normed row is rounded: to either neighbour, where it lies between two
    torch.testing.assert_close(ours, theirs, atol=10 * TOLERANCE[dtype], rtol=2e-2)


def test_a_nan_stays_one_through_relu() -> None:
    x, w, b, _ = made(8, 16)
    w[3, 4] = torch.nan
    assert row_linear(x, w, b, relu=True).isnan().nonzero().tolist() == [[0, 3]]
