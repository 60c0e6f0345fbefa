"""Tiny models with known numbers, and checkpoint files of them as fairscale's FSDP writes them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.trainer import FlatOPT, write_trainer_checkpoint
from metaseq_api.core.config import ModelConfig

TINY = ModelConfig(num_layers=2, hidden_dim=16, num_heads=4, ffn_dim=32, vocab_size=24, max_positions=14)
LAYOUTS = [(1, 1), (1, 3), (2, 2), (2, 7), (4, 5), (1, 124)]
"""(parts, shards). 672 numbers of the root over 124 shards are 112 slices of 6: the last twelve are all padding."""


def fused_weights(config: ModelConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """A whole model under metaseq's fused names, every number different, exact in the config's dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[config.dtype]
    state = FlatOPT(config).state_dict()
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in state.items()
        if name not in ("decoder.version", "decoder.output_projection.weight" if config.tied_output else "")
    }


def logical_weights(fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with keys, values and queries apart."""
    out = {}
    for name, tensor in fused.items():
        if "qkv_proj" in name:
            for letter, third in zip("kvq", tensor.chunk(3), strict=True):
                out[name.replace("qkv_proj", f"{letter}_proj")] = third
        else:
            out[name] = tensor
    return out


def write_shards(
    folder: Path, config: ModelConfig = TINY, *, parts: int = 2, shards: int = 2, seed: int = 0, **kw: Any
) -> list[Path]:
    """Write `fused_weights` as the trainer would."""
    weights = fused_weights(config, seed)
    return write_trainer_checkpoint(
        folder, weights, config, num_parts=parts, num_shards=shards, dtype=DTYPES[config.dtype], **kw
    )


def load(path: Path) -> dict[str, Any]:
    """Load a file of our own with the unrestricted loader of torch: the proof that others can."""
    state: dict[str, Any] = torch.load(path, weights_only=False, mmap=True)
    return state


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold equal numbers in tensors of equal dtype and shape."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what is in a file."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def consolidated(paths: Sequence[Path]) -> dict[str, Tensor]:
    """One part's weights, put together by fairscale."""
    from fairscale.nn import FullyShardedDataParallel as FSDP

    states = [load(path) for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out: dict[str, Tensor] = FSDP.consolidate_shard_weights(
            [s["model"] for s in states], [s["shard_metadata"] for s in states]
        )
    return out


def with_dtype(dtype: str, **changes: Any) -> ModelConfig:
    """TINY in another dtype."""
    return dataclasses.replace(TINY, dtype=dtype, **changes)
