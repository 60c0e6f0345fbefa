"""Opens damaged checkpoints by the thousand: fuzz.py MANIFEST, which lists folders and how often each is damaged.

A process of its own, since its memory is limited: what it says at the end is counts, and the faults of the readers.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import pickletools
import random
import resource
import signal
import struct
import sys
import traceback
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.core.config import OPT_SHAPES, ModelConfig
from metaseq_api.errors import CheckpointError

SPARE = 256 << 20
"""Units: bytes of address space above what the sound checkpoints take."""
MAX_SECONDS = 5
MAX_MESSAGE = 1000
OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes]
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 7, 2**31, 2**53, 2**64, 10**400, 0.5, 1e308, "", "x", "F32", "../x", "\x1b[2J\n", [], {}),
    *([0], [1, 2, 3], [-1, 4], [2**40, 2**40], {"a": 1}, [[[[[]]]]], ["a"] * 50),
)


@dataclass(frozen=True)
class Sound:
    """A file before it is damaged. hot: places whose bytes are read as structure. ops: where opcodes of pickles are."""

    path: Path
    data: bytes
    hot: list[int]
    ops: list[int]

    @cached_property
    def tree(self) -> Any:
        """What torch.load makes of it; None where it is no file of torch.save, or one with foreign classes."""
        if self.path.suffix not in (".pt", ".bin"):
            return None
        try:
            return torch.load(self.path, weights_only=False)
        except (ImportError, AttributeError):
            return None


def look(path: Path) -> Sound:
    data = path.read_bytes()
    ops = list(_opcodes(data))
    hot = [at for begin in _marks(data) for at in range(max(0, begin - 4), min(len(data), begin + 60))] + ops
    if path.suffix == ".json":
        hot = list(range(len(data)))
    elif path.suffix == ".safetensors":
        hot = list(range(8 + struct.unpack("<Q", data[:8])[0]))
    return Sound(path, data, hot or [0], ops)


def _marks(data: bytes) -> Iterator[int]:
    at = data.find(b"PK")
    while at >= 0:
        yield at
        at = data.find(b"PK", at + 1)


def _opcodes(data: bytes) -> Iterator[int]:
    """Where the pickles' opcodes are; a pickle begins with its protocol and ends with STOP."""
    at = data.find(b"\x80")
    while at >= 0:
        if data[at + 1 : at + 2] in (b"\x02", b"\x04"):
            try:
                found = [(place, op.code) for op, _, place in pickletools.genops(data[at : at + 200_000])]
                yield from (at + place for place, _ in found)
                at += found[-1][0]
            except (ValueError, IndexError, struct.error):
                pass
        at = data.find(b"\x80", at + 1)


def damaged(sound: Sound, chance: random.Random) -> bytes:
    """One mutated file."""
    if sound.path.suffix in (".json", ".safetensors") and chance.random() < 0.5:
        return _json_damaged(sound, chance)
    if sound.data[:2] == b"PK" and sound.path.suffix != ".distcp" and chance.random() < 0.3:
        return _pickle_damaged(sound, chance)
    if sound.tree is not None and chance.random() < 0.25:
        return _tree_damaged(sound, chance)
    data = bytearray(sound.data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(MUTATIONS)(data, sound, chance)
    return bytes(data)


def _place(data: bytearray, sound: Sound, chance: random.Random) -> int:
    at = chance.choice(sound.hot) if chance.random() < 0.8 else chance.randrange(len(sound.data))
    return min(at, max(0, len(data) - 1))


def _length(chance: random.Random) -> int:
    return chance.choice((1, 2, 4, 8, 30, 100, 1000, 4096))


def _flip(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    if data:
        data[_place(data, sound, chance)] ^= 1 << chance.randrange(8)
    return data


def _byte(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    if data:
        data[_place(data, sound, chance)] = chance.randrange(256)
    return data


def _cut(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    return data[: _place(data, sound, chance)]


def _splice(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    at, source, length = _place(data, sound, chance), _place(data, sound, chance), _length(chance)
    data[at : at + length] = data[source : source + length]
    return data


def _double(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    at, length = _place(data, sound, chance), _length(chance)
    data[at:at] = data[at : at + length]
    return data


def _drop(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    at = _place(data, sound, chance)
    del data[at : at + _length(chance)]
    return data


def _zero(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    at = _place(data, sound, chance)
    stop = min(len(data), at + _length(chance))
    data[at:stop] = bytes(stop - at)
    return data


def _number(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    """A length, a count or an offset that no file has."""
    at, width = _place(data, sound, chance), chance.choice((1, 2, 4, 8))
    value = chance.choice(EXTREMES) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, "little")
    return data


def _opcode(data: bytearray, sound: Sound, chance: random.Random) -> bytearray:
    if not sound.ops:
        return _flip(data, sound, chance)
    at = min(chance.choice(sound.ops), len(data))
    data[at : at + chance.randrange(2)] = chance.choice(OPCODES)
    return data


MUTATIONS: tuple[Callable[[bytearray, Sound, random.Random], bytearray], ...] = (
    *(_flip, _byte, _cut, _splice, _double, _drop, _zero, _number, _opcode, _opcode),
)


def _pickle_damaged(sound: Sound, chance: random.Random) -> bytes:
    """A valid zip file around a damaged pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sound.data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                ops = list(_opcodes(data))
                inner, pickled = Sound(sound.path, data, ops, ops), bytearray(data)
                for _ in range(chance.choice((1, 1, 2, 5))):
                    pickled = chance.choice(MUTATIONS)(pickled, inner, chance)
                data = bytes(pickled)
            new.writestr(info.filename, data)
    return out.getvalue()


def _nested(depth: int, width: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out] * width
    return out


def _evil(chance: random.Random) -> Any:
    """What a file should not say anywhere: numbers, nests and tensors that are legal and make trouble."""
    ring: list[Any] = []
    ring.append(ring)
    loop: dict[str, Any] = {}
    loop["model"] = loop
    number = chance.choice((0, -1, 3, 2**31, 2**62, 2**63, -(2**70), 10**5000, 0.5, float("nan"), float("inf"), True))
    tensors = (
        *(torch.tensor(3), torch.zeros(0), torch.zeros(1).expand(7, 1000), torch.zeros(3, dtype=torch.int64)),
        *(torch.zeros(2, 3, 4), torch.zeros(5)[1:], torch.arange(12.0).view(3, 4).t()),
    )
    texts = (
        "",
        "x",
        "\x1b[2J\n",
        "gelu",
        "x" * 5000,
        b"\0" * 9,
        None,
        ("a", 1),
        {1, 2},
        torch.float64,
        torch.Size([2, 3]),
    )
    nests = (_nested(40, 2), _nested(150, 1), ring, loop, [], {}, [1] * 1000, {i: i for i in range(50)})
    return chance.choice((number, chance.choice(tensors), chance.choice(texts), chance.choice(nests), number))


def _tree_damaged(sound: Sound, chance: random.Random) -> bytes:
    """A file that torch wrote, in which one thing is another."""
    node = sound.tree
    while True:
        inner = vars(node) if isinstance(node, Namespace) else node
        key = chance.choice(list(inner if isinstance(inner, dict) else range(len(inner))))
        nested = isinstance(inner[key], (dict, list, Namespace)) and inner[key] not in ([], {}, Namespace())
        if not nested or chance.random() < 0.15:
            break
        node = inner[key]
    kept = inner[key]
    inner[key] = _evil(chance)
    out = io.BytesIO()
    try:
        torch.save(sound.tree, out, _use_new_zipfile_serialization=sound.data[:2] == b"PK")
    finally:
        inner[key] = kept
    return out.getvalue()


def _json_damaged(sound: Sound, chance: random.Random) -> bytes:
    """Valid JSON that says something else, in a header whose length is right."""
    text, rest = sound.data, b""
    if sound.path.suffix == ".safetensors":
        stop = 8 + struct.unpack("<Q", text[:8])[0]
        text, rest = text[8:stop], text[stop:]
    tree = json.loads(text)
    for _ in range(chance.choice((1, 1, 2, 4))):
        node = tree
        while True:
            key = chance.choice(list(node if isinstance(node, dict) else range(len(node))))
            if not (isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.8):
                break
            node = node[key]
        if chance.random() < 0.7:
            node[key] = copy.deepcopy(chance.choice(VALUES))
        elif isinstance(node, dict) and chance.random() < 0.5:
            node[str(chance.choice(VALUES))] = node.pop(key)
        else:
            del node[key]
        if not tree:
            break
    out = json.dumps(tree).encode()
    if chance.random() < 0.03:
        out = b"[" * 100_000 + out
    return (struct.pack("<Q", len(out)) + out + rest) if sound.path.suffix == ".safetensors" else out


def read_all(folder: Path) -> None:
    """Open a checkpoint and read every number of it."""
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.tensor(name).read_all()
    for vectors in checkpoint.moments().values():
        for vector in vectors.values():
            vector.read_all()


class TooSlow(BaseException):
    """A case took longer than any should."""


def _alarm(*_: object) -> None:
    raise TooSlow


def fault(folder: Path) -> str | None:
    """Read a damaged checkpoint: None where it reads, "" where it is refused as it should be, else what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        read_all(folder)
    except CheckpointError as error:
        text = str(error)
        proper = str(folder) in text and text.isprintable() and len(text) < MAX_MESSAGE
        return "" if proper else f"the message {ascii(text)[:400]}"
    except (Exception, TooSlow) as error:
        where = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__}: {error} at {[f'{f.name}:{f.lineno}' for f in where][-4:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def run(folder: Path, count: int, found: dict[str, Any]) -> None:
    sound = [look(path) for path in sorted(folder.iterdir()) if path.is_file()]
    chance = random.Random(folder.name)
    for case in range(count):
        target = chance.choice(sound)
        target.path.write_bytes(damaged(target, chance))
        what = fault(folder)
        if what:
            found["faults"].append(f"{folder.name}, case {case}, {target.path.name}: {what}")
        target.path.write_bytes(target.data)
        found["refused"] += what == ""
        found["cases"] += 1


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    manifest = json.loads(Path(sys.argv[1]).read_text())
    OPT_SHAPES["opt-tiny"] = ModelConfig(**manifest["published"])
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _alarm)
    for folder, _ in manifest["folders"]:
        read_all(Path(folder))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + SPARE, resource.RLIM_INFINITY))
    found: dict[str, Any] = {"cases": 0, "refused": 0, "faults": []}
    for folder, count in manifest["folders"]:
        run(Path(folder), count, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
