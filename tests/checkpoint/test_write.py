"""A file has its name when it is whole, and not before."""

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaseq_api.checkpoint import write
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.write import Stream, save
from metaseq_api.errors import ResourceError


def _tree() -> dict[str, object]:
    shared = Stream.of(torch.arange(12.0).view(3, 4))
    pieces = Stream((2, 3), torch.bfloat16, lambda: iter([torch.ones(1).bfloat16(), torch.zeros(5).bfloat16()]))
    return {
        "model": {"a": shared, "b": pieces, "again": shared},
        "list": [1, (Stream.of(torch.tensor(7)), "x")],
        "empty": Stream.of(torch.empty(0, 4)),
        "size": torch.Size([1, 2]),
        "none": None,
    }


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_what_was_streamed(mmap: bool, tmp_path: Path) -> None:
    done: list[int] = []
    save(_tree(), tmp_path / "new" / "x.pt", done.append)
    loaded = torch.load(tmp_path / "new" / "x.pt", mmap=mmap)
    assert torch.equal(loaded["model"]["a"], torch.arange(12.0).view(3, 4))
    assert loaded["model"]["b"].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert loaded["model"]["again"].data_ptr() == loaded["model"]["a"].data_ptr()
    assert loaded["list"] == [1, (torch.tensor(7), "x")]
    assert loaded["empty"].shape == (0, 4)
    assert (loaded["size"], loaded["none"]) == (torch.Size([1, 2]), None)
    assert sum(done) == 12 * 4 + 6 * 2 + 8
    assert os.listdir(tmp_path / "new") == ["x.pt"]


def test_the_zip_format_finds_every_record_whole_and_a_changed_one_not(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    big = torch.arange(3_000_000, dtype=torch.float64)
    save(_tree() | {"big": Stream((len(big),), big.dtype, lambda: iter(big.split(1_000_001)))}, path)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    archive = Archive(path)
    with path.open("r+b") as raw:
        raw.seek(archive.place(archive.tree["big"]) + 8_000_000)
        raw.write(b"\1")
    with zipfile.ZipFile(path) as file:
        assert file.testzip() == f"{archive.root}/data/{archive.tree['big'].key}"


def test_every_tensor_has_a_storage_of_its_own(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    save({"a": Stream.of(whole[2:4]), "b": Stream.of(whole[4:])}, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt")
    assert [t.untyped_storage().nbytes() for t in loaded.values()] == [8, 24]


def test_a_bare_file_name_is_a_file_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save({"a": 1}, Path("x.pt"))
    assert torch.load("x.pt") == {"a": 1}


def _failing() -> Iterator[Tensor]:
    yield torch.zeros(1)
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save({"a": 1}, path)
    with pytest.raises(KeyboardInterrupt):
        save({"a": Stream((4,), torch.float32, _failing)}, path)
    assert torch.load(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.pt"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.write import Stream, save
def chunks():
    yield torch.zeros(2)
    os.kill(os.getpid(), signal.SIGKILL)
save({"a": Stream((4,), torch.float32, chunks)}, Path(sys.argv[1]))
"""


def test_a_killed_write_leaves_no_final_name_and_the_next_run_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=tmp_path).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["x.pt.partial"]
    save({"a": 1}, path)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def chunks() -> Iterator[Tensor]:
        with pytest.raises(ResourceError, match=r"x\.pt\.partial is being written by another process"):
            save({"a": 2}, path)
        yield torch.ones(1)

    save({"a": Stream((1,), torch.float32, chunks)}, path)
    assert torch.load(path) == {"a": torch.ones(1)}


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(ResourceError, match=r"x\.pt needs 400 bytes, and .* has 10 free; make room"):
        save({"a": Stream.of(torch.zeros(100))}, tmp_path / "x.pt")
    assert os.listdir(tmp_path) == []


class _Usage:
    free = 10


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"disk is full while writing .*x\.pt"):
        save({"a": Stream.of(torch.zeros(100))}, tmp_path / "x.pt")
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"file/x\.pt cannot be written"):
        save({"a": 1}, tmp_path / "file" / "x.pt")
