"""One file of torch.save, read piecewise; whatever is wrong with it is one line that names it."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.unpickle import StoredTensor
from metaseq_api.errors import CheckpointCorrupt, CheckpointNotFound


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.pt"
    tensors = {str(dtype): torch.arange(6).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int64)}
    base = torch.arange(12.0).view(3, 4)
    torch.save(tensors | {"view": base[1:, ::2], "transposed": base.t(), "empty": torch.empty(0, 4)}, path)
    return path


def test_views_equal_what_torch_loads(saved: Path) -> None:
    archive = Archive(saved)
    for name, tensor in torch.load(saved).items():
        view = archive.view(archive.tree[name])
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor), name


def test_opening_reads_no_numbers_and_holds_no_file(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    before = set(os.listdir("/proc/self/fd"))
    archive = Archive(path)
    assert set(os.listdir("/proc/self/fd")) == before
    times = os.stat(path)
    with path.open("r+b") as file:
        file.seek(archive.place(archive.tree["a"]))
        file.write(struct.pack("<f", 3.5))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert archive.view(archive.tree["a"])[0] == 3.5
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_that_changes_meanwhile_is_not_read_on(saved: Path) -> None:
    archive = Archive(saved)
    torch.save({"view": torch.zeros(3, 4)}, saved)
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt was changed while it was being read"):
        archive.view(archive.tree["view"])


@pytest.mark.parametrize("keep", [1, 30, 200, 1000, -1, -100])
def test_a_file_cut_off_anywhere_is_named(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt .*(cut off|not a file of torch\.save).*; fetch"):
        Archive(saved)


def test_an_empty_file_is_named(saved: Path) -> None:
    saved.write_bytes(b"")
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt is empty"):
        Archive(saved)


def test_a_file_of_something_else_is_named(saved: Path) -> None:
    saved.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt is not a file of torch\.save"):
        Archive(saved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no\.pt does not exist"):
        Archive(tmp_path / "no.pt")


def test_a_zip_of_something_else_is_told_from_a_checkpoint(saved: Path) -> None:
    with zipfile.ZipFile(saved, "w") as file:
        file.writestr("x/readme", "hello")
    with pytest.raises(CheckpointCorrupt, match=r"torch\.save did not write it"):
        Archive(saved)


def test_compressed_records_are_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02}." + b" " * 1000)
    with pytest.raises(CheckpointCorrupt, match="compressed"):
        Archive(saved)


def test_a_missing_record_is_named(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "y.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("data/1"):
                new.writestr(info.filename, old.read(info))
    archive = Archive(target)
    with pytest.raises(CheckpointCorrupt, match=r"y\.pt has no record data/1"):
        archive.view(archive.tree["torch.bfloat16"])


def test_a_short_record_is_named(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "y.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, data[:-2] if info.filename.endswith("data/0") else data)
    with pytest.raises(CheckpointCorrupt, match=r"y\.pt has 10 bytes in data/0"):
        Archive(target).view(Archive(target).tree["torch.float16"])


def test_records_that_lie_askew_are_read_all_the_same(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "y.pt"  # Python's zipfile aligns nothing
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    archive = Archive(target)
    assert any(archive.place(t) % t.dtype.itemsize for t in archive.tree.values())
    for name, tensor in torch.load(saved).items():
        assert torch.equal(archive.view(archive.tree[name]), tensor), name


def test_flipped_bits_end_in_numbers_or_in_one_error(saved: Path, tmp_path: Path) -> None:
    data, target = saved.read_bytes(), tmp_path / "y.pt"
    random = np.random.default_rng(0)
    for _ in range(500):
        flipped = bytearray(data)
        for at in random.integers(0, len(data), 3):
            flipped[at] ^= 1 << int(random.integers(8))
        target.write_bytes(flipped)
        try:
            archive = Archive(target)
            for tensor in archive.tree.values() if isinstance(archive.tree, dict) else ():
                if isinstance(tensor, StoredTensor):
                    archive.view(tensor)
        except CheckpointCorrupt as error:
            assert str(target) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_numbers_are_filled_in_from_any_place_and_a_file_cut_meanwhile_is_named(tmp_path: Path) -> None:
    values, path = torch.arange(5000.0), tmp_path / "x.pt"
    torch.save({"a": values, "b": values.view(50, 100).t()}, path)
    archive = Archive(path)
    for name, wanted in (("a", values), ("b", values.view(50, 100).t().reshape(-1))):
        out = torch.empty(321)
        archive.fill(out, archive.tree[name], 77)
        assert torch.equal(out, wanted[77:398])
    os.truncate(path, path.stat().st_size - 3000)
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt was changed while it was being read"):
        archive.fill(torch.empty(321), archive.tree["a"], 77)
