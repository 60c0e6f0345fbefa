"""What goes into one file of a resharded checkpoint, as a tree in which tensors are Streams.

Knows metaseq's dict around the weights and how to keep it true. Does not know where the weights come from.
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint.flat import Unit, slice_len, write_units
from metaseq_api.checkpoint.rest import Rest, Source
from metaseq_api.checkpoint.write import Stream
from metaseq_api.errors import CheckpointMismatch

BLOCK = 1 << 24
"""Units: numbers converted at a time."""
JOB = "reshard_job"
"""Which job wrote a file: a digest of its inputs and flags, so that the same job run again need not write it again."""
PER_RANK = ("rng_tracker_states", "ema", "ema_fp32_params")
"""What belongs to one rank and has no meaning for another number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPart:
    """A part as it will be written: tensors in order, how they are grouped, and what else goes with them."""

    tensors: Mapping[str, Source]
    moments: Mapping[str, Mapping[str, Source]]
    units: tuple[Unit, ...]
    rest: Rest
    num_parts: int | None = None
    """The new model-parallel size; None: unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a part is written."""

    unflatten: bool = True
    skip_optimizer_state: bool = False
    dtype: torch.dtype | None = None
    drop_metaseq_req: bool = False
    fused_qkv: bool | None = None
    """Keys, values and queries in one tensor, as metaseq's model has them, or apart; None: as they are."""


def contents(part: NewPart, shard: int, num_shards: int, form: Form, lost: list[str]) -> dict[str, Any]:
    """Make the tree of one shard's file; what cannot be kept is added to `lost`."""
    rest = part.rest
    out: dict[str, Any] = {}
    tree = rest.tree if "model" in rest.tree else {"model": None}  # or a bare state dict
    for key, value in tree.items():
        if key == "model":
            out[key] = _model(part, shard, num_shards, form)
        elif key == "last_optimizer_state" and rest.optimizer is not None:
            if not form.skip_optimizer_state:
                out[key] = _optimizer(part, shard, num_shards, form, lost)
        elif key not in ("shard_metadata", "last_optimizer_state", JOB) and isinstance(key, str):
            out[key] = rest.writable(key, value, lost)
    if rest.has_metadata or not form.unflatten:
        out["shard_metadata"] = write_units(part.units, shard, num_shards, rest.buffers)
    _adapt(out, part, form, lost)
    return out


def _adapt(out: dict[str, Any], part: NewPart, form: Form, lost: list[str]) -> None:
    """Make what the file says of itself true again."""
    extra, cfg = out.get("extra_state"), out.get("cfg")
    if isinstance(extra, dict):
        for key in PER_RANK:
            if extra.pop(key, None) is not None:
                lost.append(f"extra_state.{key}")
        if form.drop_metaseq_req and "tokenization_cache" in (extra.get("train_iterator") or ()):
            extra["train_iterator"] = None
            lost[:] = [name for name in lost if not name.startswith("extra_state.train_iterator.")]
    if not isinstance(cfg, dict):
        return
    if isinstance(cfg.get("model"), dict):
        cfg["model"] = Namespace(**{str(key): value for key, value in cfg["model"].items()})
    for group in cfg.values():
        values = vars(group) if isinstance(group, Namespace) else group
        if not isinstance(values, dict):
            continue
        if "use_sharded_state" in values:
            values["use_sharded_state"] = not form.unflatten
        if part.num_parts is not None and "model_parallel_size" in values:
            values["model_parallel_size"] = part.num_parts
    if part.num_parts is not None and isinstance(cfg.get("model"), Namespace):
        cfg["model"].model_parallel_size = part.num_parts


def _model(part: NewPart, shard: int, num_shards: int, form: Form) -> OrderedDict[str, Stream]:
    out: OrderedDict[str, Stream] = OrderedDict()
    if form.unflatten:
        for name, tensor in part.tensors.items():
            out[name] = _stream([tensor], tensor.shape, 0, tensor.numel, form.dtype)
        for name, same in part.rest.shared.items():
            out[name] = out[same]
    else:
        for unit in part.units:
            out[unit.key] = _slice(unit, part.tensors, shard, num_shards, form.dtype, part.rest.path)
    for name, tensor in part.rest.buffers.items():
        out[name] = _stream([tensor], tensor.shape, 0, tensor.numel, form.dtype)
    return out


def _optimizer(part: NewPart, shard: int, num_shards: int, form: Form, lost: list[str]) -> dict[str, Any]:
    rest = part.rest
    entries = {}
    for index, unit in enumerate(part.units):
        entry = rest.entry(index)
        if not entry:
            continue
        for name in [name for name in entry if name in part.moments]:
            del entry[name]
        entries[index] = rest.writable("last_optimizer_state.state", entry, lost)
        for kind, tensors in part.moments.items():
            if unit.names[0] in tensors:
                entries[index][kind] = _slice(unit, tensors, shard, num_shards, None, rest.path)
    out: dict[str, Any] = {}
    for key, value in (rest.optimizer or {}).items():
        out[key] = entries if key == "state" else rest.writable(f"last_optimizer_state.{key}", value, lost)
    return out


def _slice(
    unit: Unit, tensors: Mapping[str, Source], shard: int, num_shards: int, dtype: torch.dtype | None, path: Path
) -> Stream:
    """One shard's slice of a unit, padding included."""
    length = slice_len(unit.numel, num_shards)
    members = [tensors[name] for name in unit.names]
    kinds = {str(tensor.dtype) for tensor in members}
    if dtype is None and len(kinds) > 1:
        raise CheckpointMismatch(
            f"{path} has {' and '.join(sorted(kinds))} in one unit ({unit.path or 'the root'}), which a "
            "flat vector cannot hold; give --output-dtype"
        )
    return _stream(members, (length,), shard * length, (shard + 1) * length, dtype)


def _stream(
    tensors: Sequence[Source], shape: tuple[int, ...], start: int, stop: int, dtype: torch.dtype | None
) -> Stream:
    """Numbers start to stop of tensors that follow one another, and zeros where they end."""
    own = tensors[0].dtype
    target = dtype if dtype is not None and own.is_floating_point else own

    def chunks() -> Iterator[Tensor]:
        at = 0
        for tensor in tensors:
            numel = tensor.numel
            if start < at + numel and stop > at:
                for piece in tensor.flat(max(start - at, 0), min(stop - at, numel)):
                    for block in range(0, len(piece), BLOCK):
                        yield piece[block : block + BLOCK].to(target)
            at += numel
        if stop > max(at, start):
            yield torch.zeros(stop - max(at, start), dtype=target)

    return Stream(shape, target, chunks)
