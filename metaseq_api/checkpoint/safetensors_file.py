"""The safetensors format: eight bytes of a length, a JSON header of that length, and the tensors' bytes.

Every number that a header states is checked against the file before it is used. Knows no names' meaning.
Source: the format's description at https://huggingface.co/docs/safetensors (2025-12).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint.mapped import MappedFile

LENGTH = struct.Struct("<Q")
MAX_HEADER = 100_000_000
"""Units: bytes. The format's own limit."""
ALIGNMENT = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies. Units: `start` in bytes of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One file: `entries` by name. Opening it reads the header.

    Raises: CheckpointNotFound, CheckpointCorrupt, both naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        self.path = path
        if self.file.size < LENGTH.size:
            raise self.file.corrupt(f"has {self.file.size} bytes, too few for a safetensors file")
        (length,) = LENGTH.unpack(self.file.read(0, LENGTH.size))
        if length > min(MAX_HEADER, self.file.size - LENGTH.size):
            raise self.file.corrupt(
                f"is cut off or not a safetensors file: a header of {length} bytes in {self.file.size}"
            )
        self._data = LENGTH.size + length
        try:
            header = json.loads(self.file.read(LENGTH.size, length).decode(), object_pairs_hook=_once)
            if not isinstance(header, dict):
                raise ValueError("it is not an object")
            header.pop("__metadata__", None)
            self.entries = {name: self._entry(name, value) for name, value in header.items()}
        except (ValueError, RecursionError) as error:
            raise self.file.corrupt(f"has a damaged header ({ascii(str(error))[1:-1][:200]})") from None
        self._check_places()

    def view(self, entry: Entry) -> Tensor:
        """Map a tensor without reading it; to be copied from, not written to."""
        return self.file.numbers(entry.start, math.prod(entry.shape), entry.dtype).view(entry.shape)

    def _entry(self, name: str, value: Any) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {dtype!r}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name} has a shape or offsets that are not whole numbers")
        entry = Entry(DTYPES[dtype], tuple(shape), self._data + offsets[0])
        if entry.num_bytes != offsets[1] - offsets[0]:
            raise ValueError(f"{name} takes {entry.num_bytes} bytes and is given {offsets[1] - offsets[0]}")
        return entry

    def _check_places(self) -> None:
        """The tensors fill the file from the header to its end, one after the other."""
        at = self._data
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
            if entry.start != at:
                raise self.file.corrupt(f"has bytes that belong to two tensors or to none before {name!a}")
            at += entry.num_bytes
        if at != self.file.size:
            raise self.file.corrupt(f"is cut off or damaged: its tensors end at byte {at}, and it has {self.file.size}")


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out


def make_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], said: Mapping[str, str]) -> bytes:
    """Make the head of a file that holds these tensors in this order, and these words; their bytes follow it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(said)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return LENGTH.pack(len(text)) + text
