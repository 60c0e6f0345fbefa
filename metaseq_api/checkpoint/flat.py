"""The arithmetic of fairscale's flat parameters: integers and names only, no tensors, no files.

An FSDP unit (one layer, or what no layer holds) concatenates its parameters into one vector of `numel` numbers, and
shard K of D keeps the numbers from K * S on, where S = ceil(numel / D). A slice is filled up with zeros to S, so that
several trailing shards may hold padding, or nothing else. Each shard's metadata states its own.

Source: fairscale's fully_sharded_data_parallel.py (`_get_shard`, `local_metadata_dict`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metaseq_api.checkpoint.rules import EMBED, OUTPUT, clean

FLAT = re.compile(r"(?:.*\.)?flat_param(?:_\d+)?")
_LAYER = re.compile(r"(decoder\.layers\.\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Unit:
    """One flat parameter. `names` are whole stored names in the order in which their numbers follow one another."""

    path: str
    flat_name: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[str, str], ...] = ()
    """(the parameter that is kept, the one that is the same): whole names."""

    @property
    def key(self) -> str:
        """Its name among the tensors of a file."""
        return join(self.path, self.flat_name)

    @property
    def numels(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def numel(self) -> int:
        return sum(self.numels)


def join(path: str, name: str) -> str:
    """Put a module's path before a name relative to it."""
    return clean(f"{path}.{name}" if path else name)


def is_flat(key: str) -> bool:
    """Say whether a stored name is that of a flat parameter."""
    return FLAT.fullmatch(key) is not None


def slice_len(numel: int, num_shards: int) -> int:
    """Length of every shard's slice, padding included."""
    return -(-numel // num_shards)


def held(numel: int, length: int, shard: int) -> range:
    """The numbers of the unit that a shard with slices of this length holds."""
    start = min(shard * length, numel)
    return range(start, min(start + length, numel))


def read_units(metadata: Any) -> tuple[tuple[Unit, ...], dict[str, int]]:
    """Read `shard_metadata`: the units in order, and the padding of this file's slice of each by the unit's key.

    Raises: ValueError where it is not fairscale's.
    """
    units, padding = [], {}
    try:
        for entry in metadata["param_metadata"]:
            path = clean(entry["fsdp_path"] + ".").rstrip(".")
            shared = tuple((join(path, src), join(path, dst)) for src, dst in entry.get("shared_param_info", ()))
            for flat_name, info in entry["params"].items():
                names = tuple(join(path, name) for name in info["names"])
                shapes = tuple(tuple(int(n) for n in shape) for shape in info["shapes"])
                unit = Unit(path, flat_name, names, shapes, shared)
                negative = any(n < 0 for shape in shapes for n in (*shape, int(info["padding"])))
                if not "".join((path, str(flat_name), *names)).isprintable():
                    raise ValueError("a name is not a text")
                if len(names) != len(shapes) or tuple(info["numels"]) != unit.numels or negative:
                    raise ValueError("names, shapes, numels and padding disagree")
                units.append(unit)
                padding[unit.key] = int(info["padding"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its shard_metadata is not fairscale's ({type(error).__name__}: {error})") from None
    return tuple(units), padding


def relaid(units: Sequence[Unit], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Unit, ...]:
    """Units of unflattened weights: metadata tells which belong together, the tensors how large they are.

    After metaseq's reshard_mp the shapes in the metadata are those of the files before.
    """
    if any(name not in shapes for unit in units for name in unit.names):
        return ()
    return tuple(replace(unit, shapes=tuple(shapes[name] for name in unit.names)) for unit in units)


def write_units(units: Iterable[Unit], shard: int, num_shards: int, buffers: Iterable[str]) -> dict[str, Any]:
    """Make the `shard_metadata` of one shard, entries in fairscale's order, which its readers unpack by position."""
    entries: dict[str, dict[str, Any]] = {}
    for unit in units:
        entry = entries.setdefault(
            unit.path,
            {"fsdp_path": unit.path, "params": {}, "no_broadcast_optim_state": False, "shared_param_info": []},
        )
        relative = [_relative(unit.path, name) for name in unit.names]
        length = slice_len(unit.numel, num_shards)
        entry["params"][unit.flat_name] = {
            "names": relative,
            "shapes": [torch.Size(shape) for shape in unit.shapes],
            "numels": list(unit.numels),
            "padding": length - len(held(unit.numel, length, shard)),
        }
        entry["shared_param_info"] = [tuple(_relative(unit.path, name) for name in pair) for pair in unit.shared]
    return {"param_metadata": list(entries.values()), "buffer_names": list(buffers)}


def _relative(path: str, name: str) -> str:
    return name.removeprefix(f"{path}.") if path else name


def units_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Unit, ...]:
    """Lay out ordinary parameters as metaseq's wrapping would: a unit for the root and one for each layer.

    The order within a unit is that of the file, which is the order of registration.
    """
    groups: dict[str, list[str]] = {"": []}
    for name in shapes:
        layer = _LAYER.fullmatch(name)
        groups.setdefault(layer[1] if layer else "", []).append(name)
    tied = () if OUTPUT in shapes else ((EMBED, OUTPUT),)
    return tuple(
        Unit(path, "flat_param_0", tuple(names), tuple(shapes[name] for name in names), () if path else tied)
        for path, names in groups.items()
    )
