"""A checkpoint as the model sees it: a config, and whole tensors of which any slice can be read.

Knows how parts make up the model, and what the files say about its shape. Does not know ranks or devices: whoever
loads asks for its own slice, whatever number of parts the files have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.folder import FileSet, with_numbers
from metaseq_api.checkpoint.part import Header, Part, check_same
from metaseq_api.checkpoint.tensors import LocalTensor, LogicalTensor
from metaseq_api.core.config import POSITION_OFFSET, ModelConfig, heads_from_shape, tensor_shapes
from metaseq_api.errors import CheckpointMismatch, CheckpointNotFound

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Checkpoint:
    """One model on disk. Opening it has read headers only; `tensor` and `read` go to the numbers."""

    def __init__(self, files: FileSet) -> None:
        """Raises: CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt, naming the file."""
        self.files = files
        headers = Header.read_all(path for shards in files.files for path in shards)
        check_same(headers)
        num = files.num_shards
        self.parts = tuple(Part(headers[at : at + num]) for at in range(0, len(headers), num))
        self._check_num_parts()
        self._tensors = self._joined([part.tensors for part in self.parts])
        self.config = _config(self)
        self._check_shapes()

    @property
    def path(self) -> Path:
        """Its first file."""
        return self.files.files[0][0]

    @property
    def num_parts(self) -> int:
        return self.files.num_parts

    @property
    def num_shards(self) -> int:
        return self.files.num_shards

    @property
    def layout(self) -> str:
        """What kind of files these are, in words."""
        kind = "flattened" if self.parts[0].is_flat else "unflattened"
        return f"{kind}, {self.num_parts} parts x {self.num_shards} shards"

    @property
    def cfg(self) -> dict[str, Any]:
        """The training configuration of the first file, as plain dicts."""
        return self.parts[0].first.cfg

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(t.numel * t.dtype.itemsize for t in self._tensors.values())

    def names(self) -> list[str]:
        """Logical names of all weights; a tied output projection is not one of them."""
        return list(self._tensors)

    def tensor(self, name: str) -> LogicalTensor:
        """Find a weight by its logical name. Raises: CheckpointMismatch."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointMismatch(f"{self.path} has no tensor {name}; is it a checkpoint of this model?") from None

    def moments(self) -> dict[str, dict[str, LogicalTensor]]:
        """Whole optimizer vectors by kind and logical name; a tied output is under the embedding alone."""
        kinds = self.parts[0].moments
        return {kind: self._joined([part.moments.get(kind, {}) for part in self.parts]) for kind in kinds}

    def _joined(self, parts: Sequence[Mapping[str, LocalTensor]]) -> dict[str, LogicalTensor]:
        try:
            return dict(_join(parts))
        except KeyError as error:
            raise CheckpointMismatch(
                f"{self.path} holds {error}, which another part lacks; fetch the parts again"
            ) from None
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{self.path}: {error}") from None

    def _check_num_parts(self) -> None:
        """The width of out_proj tells over how many parts it was split, whatever the file names say."""
        shapes = {name: t.shape for name, t in self.parts[0].tensors.items()}
        for name, shape in shapes.items():
            if name.endswith("self_attn.out_proj.weight") and len(shape) == 2:
                true, rest = divmod(shape[0], shape[1] or 1)
                if rest == 0 and true > self.num_parts:
                    missing = with_numbers(self.path, part=self.num_parts)
                    raise CheckpointNotFound(
                        f"{missing} is missing: the tensors are split over {true} parts, and {self.num_parts} "
                        f"{'was' if self.num_parts == 1 else 'were'} found; put all parts into {self.path.parent}"
                    )
                if rest or true < self.num_parts:
                    raise CheckpointMismatch(
                        f"{self.path} is one of {self.num_parts} parts by its name, but its {name} is {shape}, "
                        f"that of a model in {max(true, 1)}; put the files of one checkpoint together"
                    )
                return

    def _check_shapes(self) -> None:
        wanted = tensor_shapes(self.config)
        for name in sorted(set(wanted) | set(self._tensors)):
            found = self._tensors[name].shape if name in self._tensors else None
            if found != wanted.get(name):
                raise CheckpointMismatch(
                    f"{self.path} has {_shape(found)} for {name}, where a model of {self.config.num_layers} layers and "
                    f"width {self.config.hidden_dim} has {_shape(wanted.get(name))}; is a file of another model there?"
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else " x ".join(map(str, shape))


def _join(parts: Sequence[Mapping[str, LocalTensor]]) -> Iterable[tuple[str, LogicalTensor]]:
    """Make logical tensors of the parts' local ones."""
    for stored, local in parts[0].items():
        logical = rules.logical_names(stored)
        if not local.shape or local.shape[0] % len(logical):
            raise CheckpointMismatch(f"tensor {stored} of shape {_shape(local.shape)} is not three equal thirds")
        num_rows = local.shape[0] // len(logical)
        for third, name in enumerate(logical):
            dim = rules.split_dim(name)
            if dim is not None and dim >= len(local.shape):
                raise CheckpointMismatch(f"tensor {stored} has {len(local.shape)} dimensions, too few for an OPT")
            locals_ = [part[stored] for part in parts] if dim is not None else [local]
            shape = [num_rows, *local.shape[1:]]
            if dim is not None:
                shape[dim] *= len(locals_)
            sources = tuple((source, third * num_rows) for source in locals_)
            yield name, LogicalTensor(name, tuple(shape), local.dtype, dim, sources)


def _config(checkpoint: Checkpoint) -> ModelConfig:
    """Read the model's shape off its tensors, and off cfg what they do not tell."""
    tensors = checkpoint._tensors
    cfg = checkpoint.cfg.get("model")
    model: dict[str, Any] = cfg if isinstance(cfg, dict) else {}
    embed, positions = checkpoint.tensor(rules.EMBED), checkpoint.tensor(rules.POSITIONS)
    layers = {int(m[1]) for name in tensors if (m := re.match(r"decoder\.layers\.(\d+)\.", name))}
    tables = len(embed.shape) == len(positions.shape) == 2 and embed.numel and positions.shape[0] > POSITION_OFFSET
    if not tables or not positions.numel or not layers:
        raise CheckpointMismatch(f"{checkpoint.path} holds no OPT model: no layers, or embeddings that are not tables")
    first = checkpoint.tensor("decoder.layers.0.fc1.weight")
    dtype = next((name for name, dtype in DTYPES.items() if dtype == embed.dtype), None)
    if dtype is None:
        raise CheckpointMismatch(f"{checkpoint.path} holds {embed.dtype}; a checkpoint is fp32, fp16 or bf16")
    num_layers, width = len(layers), positions.shape[1]
    heads = model.get("decoder_attention_heads") or heads_from_shape(num_layers, width)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointMismatch(
            f"{checkpoint.path} does not say how many attention heads its {num_layers} layers of width {width} have "
            f"(found {ascii(heads)[:40]}); its cfg.model.decoder_attention_heads must be a number that divides {width}"
        )
    final_norm = "decoder.layer_norm.weight" in tensors
    return ModelConfig(
        num_layers=num_layers,
        hidden_dim=width,
        num_heads=heads,
        ffn_dim=first.shape[0],
        vocab_size=embed.shape[0],
        max_positions=positions.shape[0] - POSITION_OFFSET,
        embed_dim=embed.shape[1],
        pre_norm=bool(model.get("decoder_normalize_before", final_norm)),
        final_norm=final_norm,
        activation=model["activation_fn"] if isinstance(model.get("activation_fn"), str) else "relu",
        dtype=dtype,
        tied_output=rules.OUTPUT not in tensors,
        bias="decoder.layers.0.fc1.bias" in tensors,
    )
