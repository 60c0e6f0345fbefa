"""Files of torch before 1.6: read piecewise like any other, and whatever is wrong with one is a line that names it."""

import io
import mmap
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.legacy import MAGIC, VERSION
from metaseq_api.checkpoint.unpickle import MAX_PICKLE, StoredTensor
from metaseq_api.errors import CheckpointCorrupt

MACHINE = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.pt"
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8)
    tensors = {str(dtype): torch.arange(6).to(dtype) for dtype in dtypes}
    base = torch.arange(12.0).view(3, 4)
    tensors |= {"view": base[1:, ::2], "transposed": base.t(), "same": base, "empty": torch.empty(0, 4)}
    torch.save(tensors | {"parameter": torch.nn.Parameter(base)}, path, _use_new_zipfile_serialization=False)
    return path


def stream(*values: Any, numbers: bytes = b"") -> bytes:
    return b"".join(pickle.dumps(value, protocol=2) for value in values) + numbers


def test_views_equal_what_torch_loads(saved: Path) -> None:
    archive = Archive(saved)
    for name, tensor in torch.load(saved).items():
        view = archive.view(archive.tree[name])
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor), name
    assert archive.tree["view"].key == archive.tree["same"].key


def test_opening_reads_no_numbers_and_holds_no_file(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    torch.save({"a": torch.zeros(1 << 20)}, path, _use_new_zipfile_serialization=False)
    before = set(os.listdir("/proc/self/fd"))
    archive = Archive(path)
    times = os.stat(path)
    with path.open("r+b") as file:
        file.seek(archive.place(archive.tree["a"]))
        file.write(struct.pack("<f", 3.5))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert archive.view(archive.tree["a"])[0] == 3.5
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_slice_of_a_tensor_that_lies_askew_copies_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path, windows = torch.arange(1 << 20, dtype=torch.float32), tmp_path / "x.pt", []
    for pad in range(5):  # one of four lengths of the pickle puts the numbers where they are not aligned
        torch.save({"pad": "-" * pad, "a": whole}, path, _use_new_zipfile_serialization=False)
        archive = Archive(path)
        if archive.place(archive.tree["a"]) % 4:
            break
    real = mmap.mmap

    def recorded(fileno: int, length: int, **kw: Any) -> mmap.mmap:
        windows.append(length)
        return real(fileno, length, **kw)

    monkeypatch.setattr("metaseq_api.checkpoint.mapped.mmap.mmap", recorded)
    assert torch.equal(archive.flat(archive.tree["a"], 500_000, 500_100), whole[500_000:500_100])
    assert len(windows) == 1
    assert windows[0] <= 400 + mmap.ALLOCATIONGRANULARITY


def test_numbers_that_lie_out_of_order_come_in_order(saved: Path) -> None:
    archive, loaded = Archive(saved), torch.load(saved)
    for name in ("view", "transposed", "same"):
        assert torch.equal(archive.flat(archive.tree[name], 1, 5), loaded[name].reshape(-1)[1:5]), name


class _FloatStorage:
    """Stands for torch's class of this name while a pickle of before torch 0.4 is made."""


_FloatStorage.__module__, _FloatStorage.__qualname__ = "torch", "FloatStorage"


class _Before04(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes each tuple ("storage", ...) as a reference, and FloatStorage by its name."""

    def persistent_id(self, value: Any) -> Any:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def save_global(self, value: Any, name: str | None = None) -> None:
        self.write(f"c{value.__module__}\n{value.__qualname__}\n".encode())


class _Tensor:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor, self.args


def _sharing(start: int, length: int, tensor_offset: int) -> bytes:
    """A tensor of two numbers in a view of a storage of eight."""

    class Reference(tuple[Any, ...]):
        pass

    out = io.BytesIO()
    pickler = _Before04(out, protocol=2)
    reference = ("storage", _FloatStorage, "7", "cpu", 8, ("8", start, length))
    pickler.dump({"a": _Tensor(reference, tensor_offset, (2,), (1,))})
    numbers = struct.pack("<q8f", 8, *range(8))
    return stream(MAGIC, VERSION, MACHINE) + out.getvalue() + stream(["7"], numbers=numbers)


def test_a_storage_that_is_a_view_of_another_begins_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(_sharing(3, 4, 1))
    archive = Archive(tmp_path / "x.pt")
    assert archive.view(archive.tree["a"]).tolist() == [4, 5]


@pytest.mark.parametrize(("start", "length", "offset"), [(3, 4, 3), (5, 4, 0), (-1, 4, 0), (3, 9, 0), (0, -1, 0)])
def test_a_view_that_reaches_past_its_storage_is_refused(start: int, length: int, offset: int, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(_sharing(start, length, offset))
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt its pickle is damaged.*reaches past its storage"):
        Archive(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [1, 5, 14, 30, 150, 400, 900, -1, -50, -200])
def test_a_file_cut_off_anywhere_is_named(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointCorrupt, match=r"x\.pt .*(cut off|damaged).*; fetch"):
        Archive(saved)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (stream({"a": 1}), "is a pickle, but not one of torch.save"),
        (stream(MAGIC, 1002, MACHINE), "of an unknown version"),
        (stream(MAGIC, VERSION, {"little_endian": False}), "little-endian"),
        (stream(MAGIC, VERSION, MACHINE, {}, ["0"]), "one that no tensor uses"),
        (stream(MAGIC, VERSION, MACHINE, {}, {}), "its list of storages is none"),
        (stream(MAGIC, VERSION, MACHINE, {}, [[]]), "its list of storages is none"),
    ],
)
def test_other_streams_are_told_from_a_checkpoint(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match=f"x.pt .*{message}"):
        Archive(tmp_path / "x.pt")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("pickle")
        info.size = 4
        file.addfile(info, io.BytesIO(b"\x80\x02}."))


def _torchscript(path: Path) -> None:
    """The records of torch.jit.save, by their names."""
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"x/{name}", b"\x80\x02}.")
        file.writestr("x/code/__torch__.py", b"pass", zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(("write", "message"), [(_tar, "is a tar file of torch"), (_torchscript, "is a TorchScript")])
def test_what_only_torch_itself_can_read_is_refused(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "x.pt")
    with pytest.raises(CheckpointCorrupt, match=rf"x\.pt {message}"):
        Archive(tmp_path / "x.pt")


class Evil:
    """Runs a command when an ordinary unpickler meets it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", range(5))
def test_a_payload_in_any_of_the_five_pickles_is_not_run(place: int, tmp_path: Path) -> None:
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    values: list[Any] = [MAGIC, VERSION, MACHINE, OrderedDict(a=1), []]
    values[place] = [Evil(f"touch {mark}")]
    path.write_bytes(stream(*values))
    with path.open("rb") as file:
        for _ in values:
            pickle.load(file)
    assert mark.exists(), "the payload must be one that works"
    mark.unlink()
    if place == 3:
        assert "system" in str(Archive(path).tree[0].type)
    else:
        with pytest.raises(CheckpointCorrupt):
            Archive(path)
    assert not mark.exists()


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x95"])
def test_a_length_that_no_pickle_has_is_not_read(opcode: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(b"\x80\x04" + opcode + struct.pack("<Q", MAX_PICKLE + 1))
        file.truncate(4 * MAX_PICKLE)  # a hole: it takes no room
    with pytest.raises(CheckpointCorrupt, match=r"damaged \(EOFError: it states a length"):
        Archive(path)


def test_flipped_bits_end_in_numbers_or_in_one_error(saved: Path, tmp_path: Path) -> None:
    data, target = saved.read_bytes(), tmp_path / "y.pt"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        flipped = bytearray(data)
        for at in random.integers(0, len(data), 2):
            flipped[at] ^= 1 << int(random.integers(8))
        target.write_bytes(flipped)
        try:
            archive = Archive(target)
            for tensor in archive.tree.values() if isinstance(archive.tree, dict) else ():
                if isinstance(tensor, StoredTensor):
                    archive.view(tensor)
        except CheckpointCorrupt as error:
            refused += 1
            assert str(target) in str(error)  # noqa: PT017
            assert str(error).isprintable()  # noqa: PT017
    assert 500 < refused < 2000
