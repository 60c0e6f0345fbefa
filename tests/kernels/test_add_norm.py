"""The Triton kernel that adds and norms gives what plain torch gives (interpreted)."""

from __future__ import annotations

import pytest
import torch

from metaseq_api.kernels import have_triton, reference

if not have_triton():
    pytest.skip("triton is not installed; torch's CUDA builds bring it", allow_module_level=True)

from metaseq_api.kernels.add_norm import add_norm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (3, 768), (7, 1000), (2, 5120)], ids=str)
def test_any_size_gives_what_plain_torch_gives(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(shape[1])
    x, y = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    norm = reference.NormWeights(*(torch.randn(shape[1], generator=g).to(dtype) for _ in range(2)), 1e-5)
    before = x.clone(), y.clone()
    (summed, normed), (want, want_normed) = add_norm(x, y, norm), reference.add_norm(x, y, norm)
    # one addition, rounded once; but the interpreter cuts bf16 off
    torch.testing.assert_close(summed, want, atol=0, rtol=2**-7 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(normed, want_normed, atol=TOLERANCE[dtype], rtol=1e-2)
    assert x.equal(before[0])
    assert y.equal(before[1])


def test_a_nan_reaches_its_own_row_alone() -> None:
    x, y = torch.ones(3, 64), torch.arange(64.0).repeat(3, 1)
    x[1, 5] = torch.nan
    summed, normed = add_norm(x, y, reference.NormWeights(torch.ones(64), torch.zeros(64), 1e-5))
    assert summed.isnan().nonzero().tolist() == [[1, 5]]
    assert normed.isnan().all(1).tolist() == [False, True, False]
    assert normed[[0, 2]].isfinite().all()
