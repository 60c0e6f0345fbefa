"""Every layout in which metaseq's checkpoints are about, each made from the same tiny model.

Flat parameters are always fairscale's own; what was done to them afterwards is done here by hand, as the script of its
time did it.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import omegaconf_like
from support.checkpoints import TINY, edit, fused_weights, load, logical_weights, write_shards
from torch import Tensor

from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.trainer import write_trainer_checkpoint
from metaseq_api.core.config import ModelConfig

SMALL_350M: dict[str, Any] = {"embed_dim": 8, "pre_norm": False, "final_norm": False}
OUTPUT = "decoder.output_projection.weight"
EMBED = "decoder.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How files are made, how many, and how the model differs from TINY."""

    make: Callable[[Path, ModelConfig], object]
    parts: int = 1
    shards: int = 1
    published: bool = False
    """Whether the files do not tell the model's size, so that it has to be a known one."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, dtype: str) -> ModelConfig:
        return dataclasses.replace(TINY, dtype=dtype, **self.changes)


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """The model that every layout holds, keys, values and queries apart."""
    if not config.has_projection:
        return logical_weights(fused_weights(config))
    like = dataclasses.replace(config, embed_dim=config.hidden_dim, pre_norm=True, final_norm=True)
    out = {name: t for name, t in logical_weights(fused_weights(like)).items() if "decoder.layer_norm" not in name}
    generator = torch.Generator().manual_seed(1)
    for name, shape in {EMBED: (24, 8), "decoder.project_in_dim.weight": (16, 8)}.items():
        out[name] = torch.randn(shape, generator=generator).to(DTYPES[config.dtype])
    out["decoder.project_out_dim.weight"] = out["decoder.project_in_dim.weight"].t().contiguous()
    return out


def _raw(folder: Path, config: ModelConfig, parts: int, shards: int, **kw: Any) -> list[Path]:
    return write_shards(folder, config, parts=parts, shards=shards, **kw)


def _one_unit(folder: Path, config: ModelConfig, parts: int, shards: int) -> list[Path]:
    """What the trainer leaves without activation checkpointing: no layer is large enough to be a unit of its own."""
    return write_trainer_checkpoint(
        folder,
        fused_weights(config),
        config,
        num_parts=parts,
        num_shards=shards,
        dtype=DTYPES[config.dtype],
        wrap_layers=False,
    )


def _flattened(paths: list[Path], name: str = "reshard-model_part-{part}.pt", shards: int = 1) -> None:
    """Drop what reshard_mp.py of May 2022 dropped, and give the names that it gave."""
    for index, path in enumerate(paths):
        edit(path, lambda s: (s.pop("shard_metadata"), s.pop("last_optimizer_state")))
        path.rename(path.with_name(name.format(part=index // shards, shard=index % shards)))


def _padded(folder: Path, config: ModelConfig) -> None:
    """Seven slices and their padding put end to end."""
    paths = _raw(folder, config, 1, 7, optimizer_state=False)
    state, slices = load(paths[0]), [load(path)["model"] for path in paths]
    del state["shard_metadata"]
    for key in state["model"]:
        if "flat_param" in key:
            state["model"][key] = torch.cat([shard[key] for shard in slices])
    for path in paths:
        path.unlink()
    torch.save(state, folder / "reshard.pt")


def _without_cfg(folder: Path, config: ModelConfig, make: Callable[..., list[Path]]) -> None:
    paths = make(folder, config, 2, 1)
    _flattened(paths)
    for path in folder.iterdir():
        edit(path, lambda s: s.pop("cfg"))


def _unflattened(folder: Path, config: ModelConfig, name: str, metadata: bool = True) -> None:
    """As reshard_fsdp.py does it: the tensors of a unit are views of one storage."""
    for part, path in enumerate(_raw(folder, config, 2, 1)):
        edit(path, lambda s: _unflatten(s, metadata))
        path.rename(folder / name.format(part))


def _unflatten(state: dict[str, Any], metadata: bool) -> None:
    model: dict[str, Tensor] = {"decoder.version": state["model"]["decoder.version"]}
    for unit in state["shard_metadata"]["param_metadata"]:
        prefix = f"{unit['fsdp_path']}." if unit["fsdp_path"] else ""
        info = unit["params"]["flat_param_0"]
        flat = state["model"][f"{prefix}flat_param_0"].split(info["numels"])
        for name, shape, piece in zip(info["names"], info["shapes"], flat, strict=True):
            model[prefix + name] = piece.view(shape)
    state["model"] = model
    del state["last_optimizer_state"]
    if not metadata:
        del state["shard_metadata"]


def _cfg(config: ModelConfig) -> dict[str, Any]:
    model = Namespace(
        arch="transformer_lm_megatron",
        decoder_attention_heads=config.num_heads,
        decoder_normalize_before=config.pre_norm,
        activation_fn=config.activation,
        share_decoder_input_output_embed=True,
    )
    return {"common": {"seed": 1, "fp16": True}, "model": model, "task": {"betas": [0.9, 0.95]}, "bpe": None}


def _lone(folder: Path, config: ModelConfig, name: str = "reshard.pt") -> Path:
    """A file without metadata, keys, values and queries apart."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"cfg": _cfg(config), "model": OrderedDict(weights(config)), "extra_state": {}, "optimizer_history": []}
    torch.save(state, folder / name)
    return folder / name


def _restored(folder: Path, config: ModelConfig, metadata: bool) -> None:
    """As convert_to_singleton.py does it: cfg has become omegaconf's, metadata is part 0's where it was there."""
    path = _lone(folder, config, "restored.pt")
    state = torch.load(path, weights_only=False)
    if metadata:
        (other,) = _raw(folder, config, 1, 1)
        state["shard_metadata"] = load(other)["shard_metadata"]
        other.unlink()
    with omegaconf_like.pretending() as classes:
        state["cfg"] = omegaconf_like.config(classes, state["cfg"])
        torch.save(state, path)


def _bare_state_dict(folder: Path, config: ModelConfig) -> None:
    path = _lone(folder, config, "restored.pt")
    torch.save(torch.load(path, weights_only=False)["model"], path)


def _stitched(folder: Path, config: ModelConfig, broken: bool) -> None:
    """As consolidate_fsdp_shards.py does it; its output projection is the first part's, half of the rows."""
    path = _lone(folder, config, "checkpoint_last_consolidated.pt")
    edit(path, lambda s: s.update(args=None))
    if broken:
        edit(path, lambda s: s["model"].update({OUTPUT: s["model"][EMBED][:12].clone()}))


def _legacy(make: Callable[[Path, ModelConfig], object]) -> Callable[[Path, ModelConfig], None]:
    """The same files, saved as torch did before 1.6."""

    def remade(folder: Path, config: ModelConfig) -> None:
        make(folder, config)
        for path in folder.iterdir():
            torch.save(load(path), path.with_suffix(".new"), _use_new_zipfile_serialization=False)
            path.with_suffix(".new").replace(path)

    return remade


RAW = Layout(lambda f, c: _raw(f, c, 2, 3), 2, 3)
PER_LAYER = Layout(lambda f, c: _flattened(_raw(f, c, 2, 1)), 2)
UNFLATTENED = Layout(lambda f, c: _unflattened(f, c, "reshard-model_part-{}.pt"), 2)

LAYOUTS: dict[str, Layout] = {
    "raw shards": RAW,
    "raw shards without optimizer state": Layout(lambda f, c: _raw(f, c, 2, 3, optimizer_state=False), 2, 3),
    "raw shards of one unit": Layout(lambda f, c: _one_unit(f, c, 2, 3), 2, 3),
    "flattened parts, a unit per layer": PER_LAYER,
    "flattened parts, one unit": Layout(lambda f, c: _flattened(_one_unit(f, c, 2, 1)), 2),
    "flattened parts called shard0": Layout(
        lambda f, c: _flattened(_raw(f, c, 2, 1), "reshard-model_part-{part}-shard{shard}.pt"), 2
    ),
    "flattened parts of one unit called shard0": Layout(
        lambda f, c: _flattened(_one_unit(f, c, 4, 1), "reshard-model_part-{part}-shard{shard}.pt"), 4
    ),
    "flattened parts in slices": Layout(
        lambda f, c: _flattened(_raw(f, c, 2, 3), "reshard-model_part-{part}-shard{shard}.pt", 3), 2, 3
    ),
    "flattened parts of one unit in slices": Layout(
        lambda f, c: _flattened(_one_unit(f, c, 2, 7), "reshard-model_part-{part}-shard{shard}.pt", 7), 2, 7
    ),
    "flattened parts with padding": Layout(_padded, published=True),
    "flattened parts without cfg": Layout(lambda f, c: _without_cfg(f, c, _raw), 2, published=True),
    "flattened parts of one unit without cfg": Layout(lambda f, c: _without_cfg(f, c, _one_unit), 2, published=True),
    "unflattened parts": UNFLATTENED,
    "OPT-IML": Layout(lambda f, c: _unflattened(f, c, "checkpoint_1_4000.pt-model_part-{}.pt", False), 2),
    "OPT-IML 175B": Layout(lambda f, c: _unflattened(f, c, "checkpoint_1_8000-model_part-{}.pt", False), 2),
    "350M": Layout(_lone, changes=SMALL_350M),
    "restored singleton": Layout(lambda f, c: _restored(f, c, False)),
    "restored singleton with metadata": Layout(lambda f, c: _restored(f, c, True)),
    "bare state dict": Layout(_bare_state_dict, published=True),
    "stitched": Layout(lambda f, c: _stitched(f, c, False)),
    "stitched with a broken output": Layout(lambda f, c: _stitched(f, c, True)),
    "legacy raw shards": dataclasses.replace(RAW, make=_legacy(RAW.make)),
    "legacy flattened parts": dataclasses.replace(PER_LAYER, make=_legacy(PER_LAYER.make)),
    "legacy unflattened parts": dataclasses.replace(UNFLATTENED, make=_legacy(UNFLATTENED.make)),
    "legacy bare state dict": Layout(_legacy(_bare_state_dict), published=True),
}
