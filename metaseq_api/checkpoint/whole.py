"""A model whose files hold whole tensors, or boxes of them, under other names than metaseq's.

Offers what `Checkpoint` does to whoever loads, so that neither the model nor the doors know the difference. Knows how
boxes make a tensor, and the shape of a model by its tensors and by Hugging Face's words. Does not know file formats.

Shapes: a vector is a matrix of one column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.core.config import POSITION_OFFSET, ModelConfig, heads_from_shape, tensor_shapes
from metaseq_api.errors import CheckpointMismatch

BLOCK = 64 << 20
"""Units: bytes mapped at a time."""
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}
"""Hugging Face's words for ours; its "gelu" is another function (erf)."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Box:
    """What one place in a file holds of a tensor: these rows and columns.

    read: maps rows start to stop of the box, counted within it. Shapes: -> [rows, columns].
    """

    rows: range
    columns: range
    read: Callable[[int, int], Tensor]

    @property
    def numel(self) -> int:
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True, slots=True)
class BoxedTensor:
    """A tensor of the whole model, in boxes that cover it. `row` is where it begins in what the boxes make up."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    row: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def split(self) -> int | None:
        """Along which dimension metaseq's parts hold it."""
        return rules.split_dim(self.name)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """Copy the slice [start, stop) along `dim` into a fresh tensor of the stored dtype."""
        assert 0 <= dim < len(self.shape), f"{self.name} has no dimension {dim}"
        assert 0 <= start <= stop <= self.shape[dim], f"{self.name} has {self.shape[dim]} of dimension {dim}"
        extents = [range(size) for size in self.shape]
        extents[dim] = range(start, stop)
        return self.box(extents[0], extents[1] if len(extents) > 1 else range(1)).reshape([len(r) for r in extents])

    def read_all(self) -> Tensor:
        """Copy the whole tensor."""
        return self.read(0, 0, self.shape[0])

    def box(self, rows: range, columns: range) -> Tensor:
        """Copy a box. Shapes: [rows, columns], also of a vector."""
        out = torch.empty((len(rows), len(columns)), dtype=self.dtype)
        rows = range(rows.start + self.row, rows.stop + self.row)
        for box in self.boxes:
            top, bottom = max(rows.start, box.rows.start), min(rows.stop, box.rows.stop)
            left, right = max(columns.start, box.columns.start), min(columns.stop, box.columns.stop)
            if top >= bottom or left >= right:
                continue
            step = max(1, BLOCK // (len(box.columns) * self.dtype.itemsize))
            for first in range(top, bottom, step):
                last = min(first + step, bottom)
                piece = box.read(first - box.rows.start, last - box.rows.start)
                target = out[first - rows.start : last - rows.start, left - columns.start : right - columns.start]
                target.copy_(piece[:, left - box.columns.start : right - box.columns.start])
        return out

    def thirds(self) -> Iterator[BoxedTensor]:
        """Take a fused `qkv_proj` apart. Raises: CheckpointMismatch."""
        names = rules.logical_names(self.name)
        num_rows, rest = divmod(self.shape[0], len(names))
        if rest:
            raise CheckpointMismatch(f"{self.name} has {self.shape[0]} rows, which are not three thirds")
        for index, name in enumerate(names):
            yield BoxedTensor(name, (num_rows, *self.shape[1:]), self.dtype, self.boxes, self.row + index * num_rows)


def extents(shape: Sequence[int]) -> tuple[range, range]:
    """Rows and columns of a matrix or a vector."""
    return range(shape[0]), range(math.prod(shape[1:]))


def is_covered(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Say whether boxes hold every number once: columns side by side, and in each the rows one after the other."""
    rows, columns = extents(shape)
    at = (columns.start, rows.stop)
    column_stop = 0
    for box in sorted(boxes, key=lambda b: (b.columns.start, b.rows.start)):
        if at[1] == rows.stop:  # the columns before are complete: the next ones begin
            if box.columns.start != column_stop or box.rows.start != 0:
                return False
            column_stop = box.columns.stop
        elif (box.columns.start, box.columns.stop, box.rows.start) != (at[0], column_stop, at[1]):
            return False
        at = (box.columns.start, box.rows.stop)
    return at[1] == rows.stop and column_stop == columns.stop


class Optimizer(Protocol):
    """What a trainer's optimizer kept; nothing of it is looked at before it is asked for.

    Raises: CheckpointMismatch, CheckpointCorrupt, naming the file.
    """

    def moments(self) -> dict[str, dict[str, BoxedTensor]]:
        """Vectors by kind (exp_avg, ...) and logical name, each in its parameter's shape."""
        ...

    def plain(self) -> dict[str, Any]:
        """{"step": int or None, "param_groups": dicts}, in which "params" are logical names; empty without any."""
        ...


@dataclass(frozen=True, slots=True)
class WholeCheckpoint:
    """One model on disk, in files of another family than metaseq's. Opening it has read headers only."""

    path: Path
    layout: str
    num_shards: int
    config: ModelConfig
    tensors: Mapping[str, BoxedTensor]
    kept: Optimizer | None = None

    @staticmethod
    def of(
        path: Path,
        layout: str,
        num_shards: int,
        tensors: Mapping[str, BoxedTensor],
        said: Mapping[str, Any],
        kept: Optimizer | None = None,
    ) -> WholeCheckpoint:
        """Make one of tensors under logical names and what a config says. Raises: CheckpointMismatch naming `path`."""
        config = config_of(path, tensors, said)
        wanted = tensor_shapes(config)
        for name in sorted(set(wanted) | set(tensors)):
            found = tensors[name].shape if name in tensors else None
            if found != wanted.get(name):
                raise CheckpointMismatch(
                    f"{path} has {found or 'no tensor'} for {ascii(name)[1:-1]}, where an OPT of {config.num_layers} "
                    f"layers and width {config.hidden_dim} has {wanted.get(name) or 'none'}; is it another model's?"
                )
        return WholeCheckpoint(path, layout, num_shards, config, tensors, kept)

    @property
    def num_parts(self) -> int:
        return 1

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(t.numel * t.dtype.itemsize for t in self.tensors.values())

    def names(self) -> list[str]:
        """Logical names of all weights; a tied output projection is not one of them."""
        return list(self.tensors)

    def moments(self) -> dict[str, dict[str, BoxedTensor]]:
        """Whole optimizer vectors by kind and logical name; a tied output is under the embedding alone."""
        return {} if self.kept is None else self.kept.moments()

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """What the optimizer kept beside the vectors: "step", and "param_groups" of logical names; maybe empty."""
        return {} if self.kept is None else self.kept.plain()

    def tensor(self, name: str) -> BoxedTensor:
        """Find a weight by its logical name. Raises: CheckpointMismatch."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointMismatch(f"{self.path} has no tensor {name}; is it a checkpoint of this model?") from None


def config_of(path: Path, tensors: Mapping[str, BoxedTensor], said: Mapping[str, Any]) -> ModelConfig:
    """Read a model's shape off its tensors, and off Hugging Face's config (`said`, maybe sparse) what they do not tell.

    Raises: CheckpointMismatch naming `path`, where words and tensors disagree or say too little.
    """
    layers = {int(m[1]) for name in tensors if (m := re.match(r"decoder\.layers\.(\d+)\.", name))}
    found = [tensors.get(name) for name in (rules.EMBED, rules.POSITIONS, "decoder.layers.0.fc1.weight")]
    embed, positions, fc1 = (t.shape if t is not None and len(t.shape) == 2 and t.numel else (0, 0) for t in found)
    if not embed[0] or positions[0] <= POSITION_OFFSET or not fc1[0] or found[0] is None:
        raise CheckpointMismatch(f"{path} holds no OPT model: no layers, or embeddings that are not tables")
    activation = said.get("activation_function", "relu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointMismatch(
            f"{path} has the activation {ascii(activation)[:40]}; {', '.join(ACTIVATIONS)} are served"
        )
    final_norm = "decoder.layer_norm.weight" in tensors
    pre_norm = bool(said.get("do_layer_norm_before", final_norm))
    if "do_layer_norm_before" in said:
        final_norm = pre_norm and not said.get("_remove_final_layer_norm", False)
    sizes = {
        "hidden_size": positions[1],
        "num_hidden_layers": len(layers),
        "ffn_dim": fc1[0],
        "vocab_size": embed[0],
        "max_position_embeddings": positions[0] - POSITION_OFFSET,
        "word_embed_proj_dim": embed[1],
        "enable_bias": "decoder.layers.0.fc1.bias" in tensors,
        "layer_norm_elementwise_affine": True,
    }
    for key, size in sizes.items():
        if said.get(key) not in (None, size):
            raise CheckpointMismatch(
                f"{path} has {size} for {key}, and its config says {ascii(said[key])[:40]}; "
                "put one model's files together"
            )
    return ModelConfig(
        num_layers=len(layers),
        hidden_dim=positions[1],
        num_heads=_heads(path, said, len(layers), positions[1]),
        ffn_dim=fc1[0],
        vocab_size=embed[0],
        max_positions=positions[0] - POSITION_OFFSET,
        embed_dim=embed[1],
        pre_norm=pre_norm,
        final_norm=final_norm,
        activation=ACTIVATIONS[activation],
        dtype=_dtype(path, said, found[0].dtype),
        tied_output=rules.OUTPUT not in tensors,
        bias=sizes["enable_bias"] is True,
    )


def _heads(path: Path, said: Mapping[str, Any], num_layers: int, width: int) -> int:
    heads = said.get("num_attention_heads") or heads_from_shape(num_layers, width)
    if type(heads) is not int or heads < 1 or width % heads:
        raise CheckpointMismatch(
            f"{path} does not say how many attention heads its {num_layers} layers of width {width} have "
            f"(found {ascii(heads)[:40]}); put a config.json beside it with "
            f'"num_attention_heads", a number that divides {width}'
        )
    return heads


def _dtype(path: Path, said: Mapping[str, Any], stored: torch.dtype) -> str:
    """What the config says, else what is stored."""
    word = said.get("dtype", said.get("torch_dtype"))
    named = {str(dtype): name for name, dtype in DTYPES.items()}.get(f"torch.{word}")
    if named is None and stored not in _NAMES:
        raise CheckpointMismatch(f"{path} holds {stored}; a checkpoint is fp32, fp16 or bf16")
    return named or _NAMES[stored]
