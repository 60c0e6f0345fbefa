"""The stream that torch.save wrote before 1.6, and still writes with `_use_new_zipfile_serialization=False`.

Four pickles (a magic number, a version, the writer's machine, what was saved), a fifth with the storages' keys, and
then each storage: a count of eight bytes and its numbers. Knows where in the file each storage lies, and checks that
it can lie there; reads none of them. Does not know zip files, or what was saved.

Source: torch/serialization.py, `_legacy_save`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from typing import IO, Any

from metaseq_api.checkpoint.unpickle import Storage, read_stream

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
COUNT = struct.Struct("<q")


def read_legacy(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read what was saved, and for each storage's key its first byte in the file and how many there are.

    Raises: ValueError where it is no such stream, or damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic, _ = read_stream(file)
    if magic != MAGIC:
        raise ValueError("is a pickle, but not one of torch.save")
    version, _ = read_stream(file)
    machine, _ = read_stream(file)
    if version != VERSION or not isinstance(machine, dict):
        raise ValueError(f"is a stream of torch.save of an unknown version ({str(version)[:20]!a})")
    if machine.get("little_endian") is not True:
        raise ValueError("is not from a little-endian machine")
    tree, storages = read_stream(file)
    keys, _ = read_stream(file)
    return tree, _places(file, size, keys, storages)


def _places(file: IO[bytes], size: int, keys: Any, storages: Mapping[str, Storage]) -> dict[str, tuple[int, int]]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("is damaged: its list of storages is none")
    places: dict[str, tuple[int, int]] = {}
    at = file.tell()
    for key in keys:
        if key not in storages or key in places:
            raise ValueError("is damaged: it lists a storage twice, or one that no tensor uses")
        file.seek(at)
        head = file.read(COUNT.size)
        count = COUNT.unpack(head)[0] if len(head) == COUNT.size else -1
        begin, num_bytes = at + COUNT.size, storages[key].numel * storages[key].dtype.itemsize
        if count != storages[key].numel or num_bytes > size - begin:
            raise ValueError(f"is cut off or damaged: one of its storages does not lie within its {size} bytes")
        places[key] = begin, num_bytes
        at = begin + num_bytes
    return places
