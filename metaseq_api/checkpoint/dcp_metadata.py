"""What `.metadata` of torch.distributed.checkpoint says, and boxes of tensors, and objects, in its `.distcp` files.

Knows what the pickles say; imports and calls nothing of torch.distributed.checkpoint. Each box lies in its file as an
archive of torch.save of its own, which is opened when it is read. Does not know what the names mean.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py (torch 2.13).
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint.archive import LOCAL_HEADER
from metaseq_api.checkpoint.inert import Inert
from metaseq_api.checkpoint.mapped import MappedFile, contiguous
from metaseq_api.checkpoint.unpickle import BROKEN, Machine, StoredTensor, Stub, read_pickle
from metaseq_api.checkpoint.whole import Box, BoxedTensor, extents, is_covered
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch

METADATA = ".metadata"
MAX_OBJECT = 16 << 20
"""Units: bytes of an object (a number, a Namespace) that is looked at."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object's archive lies. Units: bytes."""

    file: MappedFile
    offset: int
    length: int

    def corrupt(self, what: str) -> CheckpointCorrupt:
        return self.file.corrupt(f"{what} in the {self.length} bytes from {self.offset} on")

    def tree(self) -> tuple[Any, dict[str, tuple[int, int]]]:
        """Read what was saved there, and where its records begin in the file and how long they are."""
        window = _Window(self)
        try:
            with zipfile.ZipFile(window) as archive:
                infos = archive.infolist()
            records = {i.filename.partition("/")[2]: self._record(window, i) for i in infos}
            if "byteorder" in records and self.file.read(*records["byteorder"]) != b"little":
                raise self.corrupt("is not from a little-endian machine")
            return read_pickle(self.file.read(*records["data.pkl"])), records
        except (zipfile.BadZipFile, NotImplementedError, KeyError, ValueError, EOFError, struct.error):
            raise self.corrupt("is cut off or damaged: torch.save did not write what is") from None

    def start(self, stored: StoredTensor, records: dict[str, tuple[int, int]]) -> int:
        """Find the byte of the file at which the numbers of what `tree` found begin."""
        start, length = records.get(f"data/{stored.key}", (0, 0))
        if stored.end * stored.dtype.itemsize > length:
            raise self.corrupt("holds too few numbers")
        return start + stored.offset * stored.dtype.itemsize

    def value(self) -> Any:
        """Read what was saved there as plain data; a tensor of one number is that number, any other is None."""
        if self.length > MAX_OBJECT:
            raise self.corrupt(f"is no object of a checkpoint (over {MAX_OBJECT} bytes): what is")
        tree, records = self.tree()
        if isinstance(tree, StoredTensor) and tree.numel == 1:
            return self.file.numbers(self.start(tree, records), 1, tree.dtype).item()
        try:
            return Inert(tensor=lambda stored: None)(tree)
        except ValueError:
            raise self.corrupt("is damaged: too deep a nest is") from None

    def _record(self, window: _Window, info: zipfile.ZipInfo) -> tuple[int, int]:
        if not 0 <= info.header_offset <= self.length - LOCAL_HEADER.size or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a record outside the file")
        window.seek(info.header_offset)
        mark, name_len, extra_len = LOCAL_HEADER.unpack(window.read(LOCAL_HEADER.size))
        start = info.header_offset + LOCAL_HEADER.size + name_len + extra_len
        if mark != b"PK\x03\x04" or start + info.file_size > self.length:
            raise ValueError("a record outside the file")
        return self.offset + start, info.file_size


class _Window(io.RawIOBase):
    """The bytes of a Place as a file."""

    def __init__(self, place: Place) -> None:
        self._place, self._at = place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._place.length)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._place.length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = self._place.file.read(self._place.offset + self._at, count)
        self._at += count
        return data


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, `shape` large, in an archive that has not been opened yet."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Map rows. Shapes: -> [rows, columns]. Raises: CheckpointCorrupt."""
        at = self._start()
        width = len(extents(self.shape)[1])
        flat = self.place.file.numbers(at + start * width * self.dtype.itemsize, (stop - start) * width, self.dtype)
        return flat.view(-1, width)

    def _start(self) -> int:
        """The byte of the file at which the numbers begin."""
        stored, records = self.place.tree()
        if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (self.shape, self.dtype):
            raise self.place.corrupt(f"holds no {self.dtype} of shape {self.shape}, which .metadata says is")
        if stored.stride != contiguous(self.shape):
            raise self.place.corrupt("holds a tensor whose rows do not follow one another")
        return self.place.start(stored, records)


class _Keys(Machine):
    """Keeps the index that DCP uses as a key apart by what it says: (name, offsets)."""

    def _set(self, pairs: list[Any]) -> None:
        for i in range(0, len(pairs), 2):
            key = pairs[i]
            if isinstance(key, Stub) and key.type.name == "MetadataIndex" and isinstance(key.state, dict):
                pairs[i] = (key.state.get("fqn"), *(key.state.get("offset") or ()))
        super()._set(pairs)


class Metadata:
    """What `.metadata` says: tensors by name (shape, dtype, boxes), and where everything lies.

    Raises: CheckpointNotFound, CheckpointCorrupt, naming the file; so do all methods.
    """

    def __init__(self, folder: Path) -> None:
        self.file = MappedFile(folder / METADATA)
        self._open = cache(lambda name: MappedFile(folder / name))
        try:
            state = _Keys(io.BytesIO(self.file.read(0, self.file.size))).load().state
            self.entries, self._storage = state["state_dict_metadata"], state["storage_data"]
            self._planned = state.get("planner_data")
            if not isinstance(self.entries, dict) or not isinstance(self._storage, dict):
                raise TypeError("no entries")
            if not all(type(name) is str and name.isprintable() for name in self.entries):
                raise TypeError("a name that is not a text")
        except BROKEN as error:
            raise self.file.corrupt(f"is no metadata of a checkpoint ({type(error).__name__})") from None

    def tensor(self, name: str, logical: str) -> BoxedTensor:
        """Find a tensor's boxes, and check that they cover it."""
        try:
            state = self.entries[name].state
            shape, dtype = _sizes(state["size"]), state["properties"].state[0]
            found = [(_sizes(c.state["offsets"]), _sizes(c.state["sizes"])) for c in state["chunks"]]
            if not 1 <= len(shape) <= 2 or any(len(o) != len(shape) or len(s) != len(shape) for o, s in found):
                raise ValueError("sizes that are none of a matrix")
        except BROKEN:
            raise self.file.corrupt(f"does not describe {name}") from None
        if not isinstance(dtype, torch.dtype):
            raise CheckpointMismatch(f"{self.file.path} has {name} of {dtype}; it must be fp32, fp16 or bf16")
        boxes = tuple(self._box(name, offsets, sizes, dtype) for offsets, sizes in found if all(sizes))
        if not is_covered(shape, boxes):
            raise self.file.corrupt(f"lists boxes of {name} that do not make up its shape {shape}")
        return BoxedTensor(logical, shape, dtype, boxes)

    def _box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype) -> Box:
        chunk = Chunk(self.place(name, offsets), sizes, dtype)
        rows, columns = extents(sizes)
        left = offsets[1] if len(offsets) > 1 else 0
        return Box(range(offsets[0], offsets[0] + len(rows)), range(left, left + len(columns)), chunk.read)

    def place(self, name: str, offsets: tuple[int, ...] = ()) -> Place:
        """Find where a box, or an object, lies."""
        stub = self._storage.get((name, *offsets))
        state = stub.state if isinstance(stub, Stub) and isinstance(stub.state, dict) else {}
        path, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
        if state.get("transform_descriptors"):
            raise CheckpointMismatch(f"{self.file.path} lists compressed data; save it again without an extension")
        if not (isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*", path)) or type(offset) is not int:
            raise self.file.corrupt(f"does not say where {name} lies")
        file: MappedFile = self._open(path)
        if type(length) is not int or min(offset, length) < 0 or offset + length > file.size:
            raise file.corrupt(f"is cut off: it has {file.size} bytes, and {name} is to have {length} from {offset} on")
        return Place(file, offset, length)

    @property
    def num_files(self) -> int:
        """How many files it lists."""
        states = [s.state for s in self._storage.values() if isinstance(s, Stub) and isinstance(s.state, dict)]
        return len({str(state.get("relative_path")) for state in states})

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Find the shape of a tensor; None of an object."""
        try:
            return _sizes(self.entries[name].state["size"])
        except BROKEN:
            return None

    def value(self, name: str) -> Any:
        """Read an object, or a tensor of one number, as plain data."""
        return self.place(name).value()

    def has_value(self, name: str) -> bool:
        """Say whether it lists where an object of that name lies, and one that may be read."""
        stub = self._storage.get((name,))
        return stub is not None and self.place(name).length <= MAX_OBJECT

    def order(self) -> dict[str, int] | None:
        """Tell which place each name had in the state dict that was saved; None where that was not kept.

        The entries themselves come in the order in which ranks wrote them.
        """
        planned = self._planned
        if not isinstance(planned, dict) or not all(type(name) is str for name in planned):
            return None
        return {name: place for place, name in enumerate(planned)}


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise ValueError("sizes that are not whole numbers")
    return tuple(value)
