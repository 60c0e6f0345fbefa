"""The kernels of our own on a CPU, beside plain torch in fp32; and what happens where they cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.own_kernels import needs_own, own
from torch import Tensor

from metaseq_api.kernels import compiling as module
from metaseq_api.kernels.native import native

pytestmark = needs_own
DTYPE = torch.bfloat16


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 600])
@pytest.mark.parametrize("shape", [(32, 8), (64, 31), (768, 50), (2080, 96)], ids=str)
def test_a_linear_layer_is_rounded_once(rows: int, shape: tuple[int, int]) -> None:
    inputs, outputs = shape
    x, weight, bias, residual = normal(rows, inputs), normal(outputs, inputs), normal(outputs), normal(rows, outputs)
    packed = own().pack(weight, weight.dtype)
    want = F.linear(x.float(), weight.float(), bias.float())
    close = {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(own().linear(x, packed, outputs, bias, dtype=torch.float32), want, **close)
    # a sum may be rounded to either neighbour where it lies between the two
    near = {"rtol": 2**-7, "atol": 2e-3}
    torch.testing.assert_close(own().linear(x, packed, outputs, bias, relu=True).float(), want.relu(), **near)
    torch.testing.assert_close(
        own().linear(x, packed, outputs, bias, residual).float(), want + residual.float(), **near
    )
    torch.testing.assert_close(own().linear(x, packed, outputs, None).float(), want - bias.float(), **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_layer_takes_room_that_there_is(dtype: torch.dtype) -> None:
    x, weight, room = normal(40, 64).to(dtype), normal(50, 64).to(dtype), torch.full((30, 50), 7.0)
    packed = own().pack(weight, weight.dtype)
    want = own().linear(x, packed, 50, None, dtype=torch.float32)
    got = own().linear(x[:30], packed, 50, None, dtype=torch.float32, room=room)
    assert got.equal(want[:30])
    assert got.data_ptr() == room.data_ptr()
    few = own().linear(x[10:13], packed, 50, None, dtype=torch.float32, room=room)
    assert few.equal(want[10:13])
    assert few.data_ptr() == room.data_ptr()
    assert room[3:].equal(want[3:30])
    assert own().linear(x, packed, 50, None, dtype=torch.float32, room=room).equal(want)  # too many for it


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 100])
@pytest.mark.parametrize("shape", [(8, 8), (50, 64), (768, 70), (300, 200)], ids=str)
def test_a_linear_layer_in_fp32_is_torchs(rows: int, shape: tuple[int, int]) -> None:
    inputs, outputs = shape
    x, weight, bias, residual = (
        t.float() for t in (normal(rows, inputs), normal(outputs, inputs), normal(outputs), normal(rows, outputs))
    )
    packed, want = own().pack(weight, weight.dtype), F.linear(x, weight, bias)
    close = {"rtol": 1e-5, "atol": 2e-4}
    torch.testing.assert_close(own().linear(x, packed, outputs, bias, relu=True), want.relu(), **close)
    torch.testing.assert_close(own().linear(x, packed, outputs, bias, residual), want + residual, **close)
    torch.testing.assert_close(own().linear(x, packed, outputs, None), want - bias, **close)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 7, 18, 19, 32, 100])
@pytest.mark.parametrize("shape", [(8, 8), (50, 64), (768, 70), (300, 200)], ids=str)
def test_products_in_fp32_have_the_same_bits_by_halves(rows: int, shape: tuple[int, int], stored: torch.dtype) -> None:
    inputs, outputs = shape
    x, weight = normal(rows, inputs).float(), (normal(outputs, inputs).float() / 7).to(stored)
    weight[0, 0], weight[1, 1] = torch.finfo(stored).smallest_normal / 4, -torch.finfo(stored).max
    packed, whole = own().pack(weight, torch.float32), own().pack(weight.float(), torch.float32)
    assert packed.dtype == stored
    bias, residual = normal(outputs).float(), normal(rows, outputs).float()
    got, want = (own().linear(x, by, outputs, bias, residual) for by in (packed, whole))
    assert got.dtype == torch.float32
    assert got.equal(want)
    assert want[:, 2:].abs().max() > 0.1


def test_rows_of_a_wider_tensor_are_multiplied_where_they_lie() -> None:
    wide, weight = normal(20, 96), normal(40, 64)
    packed = own().pack(weight, weight.dtype)
    assert torch.equal(
        own().linear(wide[:, 32:], packed, 40, None), own().linear(wide[:, 32:].clone(), packed, 40, None)
    )


@pytest.mark.parametrize("width", [8, 64, 100, 768])
def test_a_norm_is_computed_in_fp32(width: int) -> None:
    x, weight, bias = normal(33, width) * 3 + 5, normal(width), normal(width)
    want = F.layer_norm(x.float(), (width,), weight.float(), bias.float(), 1e-5)
    torch.testing.assert_close(own().norm(x, weight, bias, 1e-5).float(), want, rtol=2**-7, atol=2e-3)
    got = own().norm(x.float(), weight.float(), bias.float(), 1e-5)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_what_is_not_a_number_stays_none() -> None:
    x, weight = normal(2, 64), normal(32, 64)
    x[1, 3] = torch.nan
    y = own().linear(x, own().pack(weight, weight.dtype), 32, None)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert own().norm(x, weight[0, :64], weight[1, :64], 1e-5)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_activation_passes_on_what_is_not_a_number(dtype: torch.dtype) -> None:
    x, weight, bias = normal(2, 64).to(dtype), normal(32, 64).to(dtype), normal(32).to(dtype)
    bias[5] = torch.nan
    y = own().linear(x, own().pack(weight, weight.dtype), 32, bias, relu=True)
    assert y[:, 5].isnan().all()
    assert y[:, :5].isfinite().all()


def test_the_library_leaves_small_numbers_as_they_are() -> None:
    code = (
        "from metaseq_api.kernels.native import native\n"
        "assert native() is not None\n"
        "import torch\n"
        "assert 5e-324 * 1.0 == 5e-324 and (torch.tensor([1e-39]) * 1).item() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_library_is_not_kept_where_others_can_write(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert module._folder() == tmp_path / ".cache" / "metaseq-api"
    (tmp_path / ".cache").chmod(mode)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(scratch))
    assert module._folder().parent == scratch


def test_a_cache_folder_that_is_told_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "told"))
    assert module._folder() == tmp_path / "told" / "metaseq-api"
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "no/absolute/path")
    assert module._folder() == tmp_path / ".cache" / "metaseq-api"


def test_a_library_that_is_not_kept_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own()  # or there is nothing to load
    (tmp_path / ".cache").mkdir(mode=0o777)
    (tmp_path / ".cache").chmod(0o777)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    assert native.__wrapped__() is not None
    assert [p.name for p in tmp_path.iterdir()] == [".cache"]


def test_without_a_compiler_torch_serves_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "COMPILERS", ("no-such-compiler",))
    assert native.__wrapped__() is None
    assert "no C compiler" in caplog.text


def test_a_second_start_finds_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_folder", lambda: tmp_path)
    first = module.compiled()
    written = first.stat().st_mtime_ns
    assert module.compiled() == first
    assert first.stat().st_mtime_ns == written
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
