"""Writes a folder that Hugging Face's transformers loads as OPTForCausalLM, out of any checkpoint, block by block.

Every file has its name only when it is whole, and config.json, without which nothing takes the folder for a model,
comes last. Knows transformers' file names; does not import it, and does not know what a tokenizer is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.contents import JOB
from metaseq_api.checkpoint.hugging_face import CONFIG, their_name
from metaseq_api.checkpoint.outputs import write_bytes
from metaseq_api.checkpoint.safetensors_file import make_header
from metaseq_api.checkpoint.write import CHUNK, finished, put
from metaseq_api.core.config import ModelConfig, tensor_shapes
from metaseq_api.errors import CheckpointMismatch, SettingsError
from metaseq_api.progress import Progress

MAX_FILE_BYTES = 5_000_000_000
"""As transformers cuts them."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|.*\.partial")
"""What an interrupted run may have left, and the next must not leave."""
_TEXTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_WORDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Source(Protocol):
    """A tensor of which rows can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, dim: int, start: int, stop: int) -> Tensor: ...


class Weights(Protocol):
    """A whole model, as `open_checkpoint` gives it."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> Source: ...


def write_hugging_face(
    weights: Weights,
    folder: Path,
    *,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    other_files: Mapping[str, bytes] | None = None,
    job: str | None = None,
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
) -> list[Path]:
    """Write the model into a new folder, and `other_files` (a tokenizer's) with it; the paths.

    dtype: fp32, fp16 or bf16; None: as stored. job: a digest of where the weights come from; files that the same job
    left in the folder, whole, stay. Raises: SettingsError, CheckpointError, ResourceError.
    """
    config = their_config(weights.config, dtype)
    sources = {their_name(name): weights.tensor(name) for name in tensor_shapes(weights.config)}
    kinds = {name: DTYPES[dtype] if dtype else source.dtype for name, source in sources.items()}
    sizes = {name: _numel(source) * kinds[name].itemsize for name, source in sources.items()}
    groups = _groups(sizes, max_file_bytes)
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    files = [
        _File(folder / name, {n: (sources[n], kinds[n]) for n in group}, {JOB: job} if job else {})
        for name, group in zip(names, groups, strict=True)
    ]
    todo = [file for file in files if job is None or not file.is_written()]
    _clear(folder, {file.path.name for file in files if file not in todo}, is_whole=not todo)
    told = progress(sum(file.num_bytes for file in todo))
    for file in todo:
        file.write(told)
    texts = dict(other_files or {})
    if len(groups) > 1:
        places = {name: file_name for file_name, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        texts["model.safetensors.index.json"] = _json(index)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts["generation_config.json"] = _json({"_from_model_config": True} | generation)
    texts[CONFIG] = _json(config)  # the last
    for name, text in texts.items():
        write_bytes(folder / name, text)
    return [*(file.path for file in files), *(folder / name for name in texts)]


def their_config(config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """Say a model's shape in the words of Hugging Face's OPTConfig. Raises: CheckpointMismatch where it has none."""
    if config.final_norm and not config.pre_norm:
        raise CheckpointMismatch("this model has norms after each layer and one at the end; no Hugging Face OPT has")
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "word_embed_proj_dim": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.ffn_dim,
        "max_position_embeddings": config.max_positions,
        "activation_function": {"gelu": "gelu_new"}.get(config.activation, config.activation),
        "do_layer_norm_before": config.pre_norm,
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "layer_norm_elementwise_affine": True,
        "enable_bias": config.bias,
        "tie_word_embeddings": config.tied_output,
        "torch_dtype": _WORDS[dtype or config.dtype],
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "use_cache": True,
    }


def _clear(folder: Path, keep: Container[str], is_whole: bool) -> None:
    """Take away what an interrupted run left and this one does not `keep`.

    Raises: SettingsError where anything else is there.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--output {folder} is a file; name a new folder")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    ours = (CONFIG, *_TEXTS) if is_whole else _TEXTS
    other = [p.name for p in found if not (p.name in ours or _WEIGHTS.fullmatch(p.name))]
    if other:
        raise SettingsError(f"--output {folder} is not empty: it holds {other[0]}; name a new folder")
    for path in found:
        if path.name not in ours and path.name not in keep:
            path.unlink()


def _groups(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Put tensors, in order, into as many files as their bytes need."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


@dataclass(frozen=True, slots=True)
class _File:
    """One file of weights to be."""

    path: Path
    tensors: Mapping[str, tuple[Source, torch.dtype]]
    said: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(_numel(source) * dtype.itemsize for source, dtype in self.tensors.values())

    def header(self) -> bytes:
        return make_header({name: (dtype, source.shape) for name, (source, dtype) in self.tensors.items()}, self.said)

    def is_written(self) -> bool:
        """Whether it is there, whole, and of the same job: it begins with the same words."""
        header = self.header()
        if not self.path.is_file() or self.path.stat().st_size != len(header) + self.num_bytes:
            return False
        with self.path.open("rb") as file:
            return file.read(len(header)) == header

    def write(self, progress: Progress) -> None:
        header = self.header()
        total = len(header) + self.num_bytes
        with finished(self.path, total) as (file, _):
            os.ftruncate(file, total)
            at = put(file, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8), lambda done: None)
            for source, dtype in self.tensors.values():
                for block in _blocks(source):
                    at = put(file, at, block.to(dtype), progress)
            assert at == total, f"{at} bytes of {total} were written"


def _blocks(source: Source) -> Iterator[Tensor]:
    num_rows = source.shape[0]
    step = max(1, CHUNK // (_numel(source) // num_rows * source.dtype.itemsize))
    for row in range(0, num_rows, step):
        yield source.read(0, row, min(row + step, num_rows))


def _numel(source: Source) -> int:
    return torch.Size(source.shape).numel()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
