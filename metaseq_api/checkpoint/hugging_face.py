"""A folder that Hugging Face's transformers left or loads: config.json, and weights in safetensors or .bin files.

Knows its file names and how its names for an OPT's tensors and sizes correspond to ours. Does not import transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.part import weights_of
from metaseq_api.checkpoint.safetensors_file import SafetensorsFile
from metaseq_api.checkpoint.whole import Box, BoxedTensor, WholeCheckpoint, extents
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
MAX_JSON = 200_000_000
"""Units: bytes."""
HEAD = "lm_head.weight"
_RENAMED = (
    ("decoder.final_layer_norm.", "decoder.layer_norm."),
    ("decoder.project_in.", "decoder.project_in_dim."),
    ("decoder.project_out.", "decoder.project_out_dim."),
)
Found = tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""A tensor in a file: its shape and dtype, and what maps it."""


def is_hugging_face(folder: Path) -> bool:
    """Say whether a folder holds a config.json, and weights of any of the known kinds beside it."""
    kinds = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
    return (folder / CONFIG).is_file() and any(path for kind in kinds for path in folder.glob(kind))


def our_name(theirs: str) -> str:
    """Give the metaseq name of one of Hugging Face's (OPTModel's or OPTForCausalLM's); others stay as they are."""
    if theirs == HEAD:
        return rules.OUTPUT
    name = re.sub(r"^model\.(?=decoder\.)", "", theirs)
    for old, new in _RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def their_name(ours: str) -> str:
    """Give the name that OPTForCausalLM has for one of metaseq's, q, k and v apart."""
    if ours == rules.OUTPUT:
        return HEAD
    for theirs, own in _RENAMED:
        if ours.startswith(own):
            return "model." + theirs + ours.removeprefix(own)
    return "model." + ours


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: CheckpointNotFound, CheckpointCorrupt, naming the file."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_JSON).decode())
    except OSError as error:
        raise CheckpointNotFound(f"{path} cannot be read ({error.strerror}); fetch it again") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"{path} is not a JSON object; fetch or write it again")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json, which may be sparse. Raises: CheckpointMismatch naming the type of a model that is no OPT."""
    said = read_json(path)
    kind = said.get("model_type", "opt")
    if kind != "opt":
        raise CheckpointMismatch(
            f"{path} is of model_type {ascii(kind)[:40]}; only OPT models (model_type 'opt') are served"
        )
    return said


def open_hugging_face(folder: Path) -> WholeCheckpoint:
    """Open the model in a folder.

    Raises: CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt, naming the file.
    """
    said = read_config(folder / CONFIG)
    kind, files = weight_files(folder)
    tied = said.get("tie_word_embeddings", True) is not False
    tensors: dict[str, BoxedTensor] = {}
    for path in files:
        found = _safetensors(path) if path.suffix == ".safetensors" else _bin(path)
        for theirs, tensor in found:
            name = our_name(theirs)
            if rules.is_ignored(name):
                continue
            if name in tensors:
                raise CheckpointMismatch(f"{path} holds {theirs!a}, which is there twice; remove one of the files")
            tensors[name] = _boxed(path, name, tensor)
    if tied and rules.OUTPUT in tensors:  # safetensors' own save_model leaves out the embedding, not the head
        head = tensors.pop(rules.OUTPUT)
        tensors.setdefault(rules.EMBED, replace(head, name=rules.EMBED))
    return WholeCheckpoint.of(folder, f"Hugging Face, {kind}", len(files), tensors, said)


def weight_files(folder: Path) -> tuple[str, list[Path]]:
    """Choose among the weights in a folder: their kind and files. Raises: CheckpointNotFound, CheckpointCorrupt."""
    chosen = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if chosen is None:
        raise CheckpointNotFound(f"{folder} has a config.json, but none of {', '.join(WEIGHTS)}; fetch the weights")
    kind = "safetensors" if "safetensors" in chosen.name else "bin"
    if chosen.suffix != ".json":
        return kind, [chosen]
    names = read_json(chosen).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_plain(name) for name in names.values()):
        raise CheckpointCorrupt(f"{chosen} has no weight_map of file names in this folder; fetch it again")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise CheckpointNotFound(f"{missing} is missing, and {chosen} lists it; fetch it")
    return kind, files


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) is not None


def _safetensors(path: Path) -> Iterator[tuple[str, Found]]:
    file = SafetensorsFile(path)
    for name, entry in file.entries.items():
        yield name, (entry.shape, entry.dtype, partial(file.view, entry))


def _bin(path: Path) -> Iterator[tuple[str, Found]]:
    archive = Archive(path)
    for name, stored in weights_of(archive).items():
        archive.check(stored)
        yield name, (stored.shape, stored.dtype, partial(archive.view, stored))


def _boxed(path: Path, name: str, found: Found) -> BoxedTensor:
    shape, dtype, view = found
    if not 1 <= len(shape) <= 2 or not all(shape):
        raise CheckpointMismatch(f"{path} has {name!a} of shape {shape}, which is in no OPT model")
    rows, columns = extents(shape)

    def read(start: int, stop: int) -> Tensor:
        return view()[start:stop].reshape(-1, len(columns))

    return BoxedTensor(name, shape, dtype, (Box(rows, columns, read),))
