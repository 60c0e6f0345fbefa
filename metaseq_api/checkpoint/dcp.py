"""A folder of torch.distributed.checkpoint: `.metadata`, and `.distcp` files that hold boxes of tensors.

Knows what its pickles say; imports and calls nothing of torch.distributed.checkpoint. Each box lies in its file as an
archive of torch.save of its own, which is opened when it is read. Does not know what made the files: FSDP2's
`fully_shard`, tensor parallelism, or one process.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py (torch 2.13).
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.archive import LOCAL_HEADER
from metaseq_api.checkpoint.hugging_face import CONFIG, our_name, read_config
from metaseq_api.checkpoint.inert import plain
from metaseq_api.checkpoint.mapped import MappedFile, contiguous
from metaseq_api.checkpoint.unpickle import BROKEN, Machine, StoredTensor, Stub, read_pickle
from metaseq_api.checkpoint.whole import Box, BoxedTensor, WholeCheckpoint, extents, is_covered
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch

METADATA = ".metadata"
MAX_OBJECT = 16 << 20
"""Units: bytes of an object (a number, a Namespace) that is looked at."""
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_EMBED = re.compile(rf"(?P<prefix>(?:.*\.)?){re.escape(rules.EMBED)}")
_ASIDE = re.compile(r"(^|\.)(optim|optimizer|ema)")
"""What lies beside the model in the same state dict."""


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

    def plain(self) -> Any:
        """Read what was saved there as plain data."""
        try:
            return plain(self.tree()[0])
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
        start, length = records.get(f"data/{stored.key}", (0, 0))
        if stored.end * self.dtype.itemsize > length:
            raise self.place.corrupt("holds too few numbers")
        return start + stored.offset * self.dtype.itemsize


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

    def cfg(self) -> dict[str, Any]:
        """What metaseq's configuration in the state dict says of the model."""
        out: dict[str, Any] = {}
        for name in self.entries:
            match = re.fullmatch(r"(?:.*\.)?cfg(?:\.model(?:\.(\w+))?)?", name)
            place = self.place(name) if match and (name,) in self._storage else None
            if match is None or place is None or place.length > MAX_OBJECT:
                continue
            value = place.plain()
            if name.endswith("cfg") and isinstance(value, dict):
                value = value.get("model")
            if match[1]:
                out[match[1]] = value
            elif isinstance(value, dict):
                out |= value
        return out


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise ValueError("sizes that are not whole numbers")
    return tuple(value)


def is_dcp(folder: Path) -> bool:
    """Say whether a folder holds DCP's metadata and files."""
    return (folder / METADATA).is_file() and any(folder.glob("*.distcp"))


def open_dcp(folder: Path) -> WholeCheckpoint:
    """Open the model in a folder. Its names are metaseq's or Hugging Face's, under whatever prefix the trainer gave.

    What else its config should say is taken from a config.json beside it, else from metaseq's cfg in it.
    Raises: CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt, naming the file.
    """
    metadata = Metadata(folder)
    if (folder / CONFIG).is_file():
        said = {"tie_word_embeddings": True} | read_config(folder / CONFIG)
    else:  # where nobody says that the output is the embedding, it is taken as it is stored
        said = _words(metadata.cfg())
    names = _names(metadata)
    if said.get("tie_word_embeddings") is True:
        names.pop(rules.OUTPUT, None)
    tensors: dict[str, BoxedTensor] = {}
    for stored, name in names.items():
        tensors |= {third.name: third for third in metadata.tensor(name, stored).thirds()}
    return WholeCheckpoint.of(folder, "DCP", metadata.num_files, tensors, said)


def _names(metadata: Metadata) -> dict[str, str]:
    """Find the model in the state dict: the names of its tensors there, by their stored names in metaseq."""
    cleaned = {_WRAPPER.sub("", name): name for name in metadata.entries}
    prefixes = {match["prefix"] for name in cleaned if (match := _EMBED.fullmatch(name))}
    chosen = {prefix for prefix in prefixes if not _ASIDE.search(prefix)} or prefixes
    if len(chosen) != 1:
        what = f"several ({', '.join(map(ascii, sorted(chosen)[:4]))})" if chosen else "none"
        raise CheckpointMismatch(
            f"{metadata.file.path} should list one OPT model, with a tensor ...{rules.EMBED}, and lists {what}"
        )
    (prefix,) = chosen
    out: dict[str, str] = {}
    head = prefix.removesuffix("model.") + "lm_head.weight"
    for name, stored in cleaned.items():
        if name.startswith(f"{prefix}decoder."):
            ours = our_name(name.removeprefix(prefix))
        elif name == head:
            ours = rules.OUTPUT
        else:
            continue
        if not rules.is_ignored(ours):
            out[ours] = stored
    return out


def _words(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's words for what metaseq's cfg says."""
    known = {
        "num_attention_heads": cfg.get("decoder_attention_heads"),
        "activation_function": {"gelu": "gelu_new"}.get(str(cfg.get("activation_fn")), cfg.get("activation_fn")),
        "do_layer_norm_before": cfg.get("decoder_normalize_before"),
        "tie_word_embeddings": cfg.get("share_decoder_input_output_embed"),
    }
    return {key: value for key, value in known.items() if value is not None}
