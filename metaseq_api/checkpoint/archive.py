"""One file written by torch.save, opened without torch.load: its object tree, and views of its tensors.

Opening reads the zip directory, or what stands for it in a file of before torch 1.6, and the pickle. A view maps the
pages of one tensor and lets go of them, and of the file, when it is dropped: a thousand files at a time need no
thousand handles, and a file larger than memory no room. Every offset the file states is checked against the file
before it is used. Does not know metaseq.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from metaseq_api.checkpoint.alike import Pattern
from metaseq_api.checkpoint.legacy import read_legacy
from metaseq_api.checkpoint.mapped import MappedFile, read_at
from metaseq_api.checkpoint.unpickle import MAX_PICKLE, StoredTensor, read_pickle

LOCAL_HEADER = struct.Struct("<4s22xHH")
TAR_MARK = slice(257, 262)
BLOCK = 8 << 20
"""Units: bytes read at a time where a whole record is read."""


class Archive(MappedFile):
    """A checkpoint file: `tree` is what was saved, with a StoredTensor for each tensor.

    like: a file that is open and may say much the same, as shards do; what is the same in both is kept once.
    Raises: CheckpointNotFound, CheckpointCorrupt, both naming the file; so do all methods.
    """

    def __init__(self, path: Path, like: Archive | None = None) -> None:
        self.path = path
        self._like = like
        self._infos: dict[str, zipfile.ZipInfo] = {}
        self._starts: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self.root = ""
        """The folder that all records lie in: the name it was saved under, where torch.save was given one."""
        try:
            with self.opened() as file:
                self.tree: Any = self._zipped(file) if self._is_zip(file) else self._legacy(file)
        except ValueError as error:
            raise self.corrupt(str(error)) from None

    @property
    def checksums(self) -> dict[str, int]:
        """The CRC-32 stated for each record, by its name; none in a file of before torch 1.6."""
        return {name: info.CRC for name, info in self._infos.items()}

    @property
    def record_sizes(self) -> dict[str, int]:
        """Units: bytes."""
        return dict(self._sizes)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Read a record, some megabytes at a time."""
        with self.opened(buffering=0) as file:
            file.seek(self._start(file, name))
            left = self._sizes[name]
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    raise self.corrupt(f"is cut off: {left} bytes of {name} are not there")
                left -= len(block)
                yield block

    def _is_zip(self, file: IO[bytes]) -> bool:
        file.seek(0)
        head = file.read(TAR_MARK.stop)
        if not head:
            raise self.corrupt("is empty")
        if head[TAR_MARK] == b"ustar":
            raise self.corrupt("is a tar file of torch before 0.2", "load it there, and save it with a later torch")
        if head[:4] != b"PK\x03\x04" and head[:1] != b"\x80":
            raise self.corrupt("is not a file of torch.save")
        return head[:1] == b"P"

    def _legacy(self, file: IO[bytes]) -> Any:
        tree, places = read_legacy(file)
        self._starts = {f"data/{key}": start for key, (start, _) in places.items()}
        self._sizes = {f"data/{key}": num_bytes for key, (_, num_bytes) in places.items()}
        return tree

    def _zipped(self, file: IO[bytes]) -> Any:
        self._infos = self._directory(file)
        self._sizes = {name: info.file_size for name, info in self._infos.items()}
        if "data.pkl" not in self._infos:
            raise self.corrupt("is a zip file, but torch.save did not write it (no data.pkl)")
        if "byteorder" in self._infos and self._bytes(file, "byteorder") != b"little":
            raise self.corrupt("is not from a little-endian machine", "save it again on one")
        data = self._bytes(file, "data.pkl")
        tree = self._like.pattern.read(data) if self._like and self._like.pattern else None
        return read_pickle(data) if tree is None else tree

    @cached_property
    def pattern(self) -> Pattern | None:
        """What files like this one are held against; None for one of before torch 1.6."""
        if not self._infos:
            return None
        try:
            with self.opened() as file:
                pattern = Pattern(self._bytes(file, "data.pkl"))
        except ValueError as error:
            raise self.corrupt(str(error)) from None
        self.tree = pattern.tree
        return pattern

    def _directory(self, file: IO[bytes]) -> dict[str, zipfile.ZipInfo]:
        """Records by name, without the folder that torch.save puts before each."""
        try:
            infos = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError):
            raise self.corrupt(f"is cut off or damaged: its {self.size} bytes do not end in a directory") from None
        if any(info.filename.endswith("/constants.pkl") for info in infos):
            raise self.corrupt("is a TorchScript program, not a checkpoint", "name the file it was made from")
        records: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename.partition("/")[2] or info.filename
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or name in records:
                raise self.corrupt(f"holds {info.filename!r} twice, compressed or encrypted")
            if not 0 <= info.header_offset <= self.size - LOCAL_HEADER.size - info.file_size:
                raise self.corrupt(f"is cut off or damaged: {info.filename!r} lies outside its {self.size} bytes")
            records[name] = info
            self.root = info.filename.partition("/")[0]
        return records

    def _start(self, file: IO[bytes], name: str) -> int:
        """Where a record's bytes begin; the header before them has a length of its own."""
        if name not in self._starts:
            info = self._infos[name]
            file.seek(info.header_offset)
            mark, name_len, extra_len = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            start = info.header_offset + LOCAL_HEADER.size + name_len + extra_len
            if mark != b"PK\x03\x04" or info.file_size > self.size - start:
                raise self.corrupt(f"is cut off or damaged: {info.filename!r} lies outside its {self.size} bytes")
            self._starts[name] = start
        return self._starts[name]

    def _bytes(self, file: IO[bytes], name: str) -> bytes:
        if self._sizes[name] > MAX_PICKLE:
            raise self.corrupt(f"has {self._sizes[name]} bytes in {name}, more than any checkpoint")
        file.seek(self._start(file, name))
        return file.read(self._sizes[name])

    def check(self, tensor: StoredTensor) -> str:
        """Find the record of a tensor's storage, and check that the tensor lies within."""
        name = f"data/{tensor.key}"
        size = self._sizes.get(name)
        if size is None:
            raise self.corrupt(f"has no record {name} for one of its tensors")
        if tensor.end * tensor.dtype.itemsize > size:
            raise self.corrupt(f"has {size} bytes in {name}, too few for the tensor kept there")
        return name

    def place(self, tensor: StoredTensor, *, writing: bool = False) -> int:
        """Find the byte in the file at which a tensor's first number lies; writing: or will, by this caller."""
        name = self.check(tensor)
        if name not in self._starts:
            with self.opened(writing=writing) as file:
                self._start(file, name)
        return self._starts[name] + tensor.offset * tensor.dtype.itemsize

    def view(self, tensor: StoredTensor) -> Tensor:
        """Map a tensor without reading it; to be copied from, not written to."""
        self.check(tensor)
        if tensor.numel == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = self.numbers(self.place(tensor), tensor.end - tensor.offset, tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride)

    def fill(self, out: Tensor, tensor: StoredTensor, start: int) -> None:
        """Read numbers of a tensor, in order from `start` on, straight into `out`. Shapes: out is a vector."""
        if not tensor.in_order:
            out.copy_(self.view(tensor).reshape(-1)[start : start + len(out)])
            return
        name, width = self.check(tensor), tensor.dtype.itemsize
        numbers: Any = out.view(torch.uint8).numpy()
        data = memoryview(numbers)
        with self.opened(buffering=0) as file:
            at = self._start(file, name) + (tensor.offset + start) * width
            if not read_at(file.fileno(), data, at):
                raise self.changed()

    def flat(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Map numbers start to stop of a tensor, in order, and no others unless it lies in the file out of order."""
        if not tensor.in_order:
            return self.view(tensor).reshape(-1)[start:stop]
        return self.view(replace(tensor, offset=tensor.offset + start, shape=(stop - start,), stride=(1,)))
