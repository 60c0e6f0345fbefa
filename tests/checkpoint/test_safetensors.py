"""Our reader of safetensors: what the real library writes is read; what is damaged ends in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from metaseq_api.checkpoint.safetensors_file import DTYPES, MAX_HEADER, Entry, SafetensorsFile, make_header
from metaseq_api.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound

FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TENSORS = {
    "b": torch.arange(12, dtype=torch.float16).reshape(3, 4),
    "a.weight": torch.arange(7, dtype=torch.float32),
    "c": torch.tensor([[True], [False]]),
    "empty": torch.empty(0, 3, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path


def test_what_the_real_library_wrote_is_read(good: Path) -> None:
    file = SafetensorsFile(good)
    assert set(file.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(file.view(file.entries[name]), tensor)
        assert file.view(file.entries[name]).dtype == tensor.dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([[0.0, 1.0, 2.0]]).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert torch.equal(file.view(file.entries["x"]).view(torch.uint8), tensor.view(torch.uint8))


def test_the_real_library_reads_our_header(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor([1, 2], dtype=torch.int8)}
    head = make_header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {"job": "a"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + b"".join(t.numpy().tobytes() for t in tensors.values()))
    found = load_file(path)
    assert all(torch.equal(found[name], t) for name, t in tensors.items())


def write(path: Path, header: Any, data: bytes = b"\0" * 8, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED: dict[str, Any] = {
    "no object": [1],
    "no JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "a deep nest": b"[" * 100_000,
    "a huge number": b'{"x": ' + b"9" * 10_000 + b"}",
    "no description": {"x": 3},
    "one key too many": {"x": entry() | {"more": 1}},
    "an unknown dtype": {"x": entry("F31")},
    "a dtype that is a list": {"x": entry([])},
    "a negative size": {"x": entry(shape=[-2])},
    "a size that is no whole number": {"x": entry(shape=[2.0])},
    "a size that is true": {"x": entry(shape=[True])},
    "a shape too large": {"x": entry(shape=[3])},
    "offsets the wrong way": {"x": entry(offsets=[8, 0])},
    "offsets past the end": {"x": entry(shape=[4], offsets=[0, 16])},
    "three offsets": {"x": entry(offsets=[0, 4, 8])},
    "a gap": {"x": entry(shape=[1], offsets=[4, 8])},
    "an overlap": {"x": entry(), "y": entry(shape=[1], offsets=[4, 8])},
    "bytes left over": {"x": entry(shape=[1], offsets=[0, 4])},
    "a name twice": b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": 1}',
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_one_line_that_names_the_file(what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorrupt, match=r"x\.safetensors .*; fetch or write the file again") as found:
        SafetensorsFile(write(tmp_path / "x.safetensors", DAMAGED[what]))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("length", [2**64 - 1, MAX_HEADER + 1, 1000])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorrupt, match="is cut off or not a safetensors file"):
        SafetensorsFile(write(tmp_path / "x.safetensors", {"x": entry()}, length=length))


@pytest.mark.parametrize("size", [0, 7, 8, 50, -1])
def test_a_truncated_file_is_refused(size: int, good: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(good.read_bytes()[:size])
    with pytest.raises(CheckpointCorrupt):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_file_that_is_not_there_or_a_folder_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(CheckpointNotFound, match=str(path)):
            SafetensorsFile(path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"x": entry()})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointCorrupt, match="was changed"):
        file.view(file.entries["x"])


def read_or_refused(path: Path) -> list[Entry]:
    """The tensors of a file, or none where it is refused by a line that names it."""
    try:
        return list(SafetensorsFile(path).entries.values())
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    return []


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=0, max_size=3), st.integers(0, 3)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 700)),
)
def test_a_mutated_file_is_read_within_its_bounds_or_refused(
    changes: list[tuple[int, bytes, int]], cut: int | None, good: Path, tmp_path: Path
) -> None:
    data = bytearray(good.read_bytes())
    for at, new, gone in changes:
        data[at : at + gone] = new
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(data[:cut])
    for place in read_or_refused(path):
        file = SafetensorsFile(path)
        if place.num_bytes:
            assert file.view(place).numel() * place.dtype.itemsize == place.num_bytes


NUMBERS = st.one_of(st.integers(-1, 20), st.integers(), st.floats(), st.none(), st.booleans())


@FUZZ
@given(
    header=st.dictionaries(
        st.sampled_from(["x", "y", "__metadata__", "\ud800"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPES, "F4", "", None, 3]),
                "shape": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
                "data_offsets": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
            }
        ),
    )
)
def test_a_made_up_header_is_read_or_refused(header: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header)
    assert sum(place.num_bytes for place in read_or_refused(path)) in (0, 8)
