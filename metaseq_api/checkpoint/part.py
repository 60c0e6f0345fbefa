"""One tensor-parallel part, put together from the shards that hold its slices, or from one file that holds it whole.

Knows what the trainer and the reshard scripts keep in a file, and checks that shards belong together. Does not know
other parts, or what the tensors mean.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.bare import bare_units
from metaseq_api.checkpoint.flat import Unit, held, is_flat, read_units, relaid, units_of
from metaseq_api.checkpoint.folder import numbers, with_numbers
from metaseq_api.checkpoint.inert import plain
from metaseq_api.checkpoint.rules import EMBED, OUTPUT, clean, is_ignored
from metaseq_api.checkpoint.slices import FlatSlices
from metaseq_api.checkpoint.tensors import LocalTensor, Run
from metaseq_api.checkpoint.unpickle import StoredTensor
from metaseq_api.errors import CheckpointMismatch, CheckpointNotFound

log = logging.getLogger(__name__)


def weights_of(archive: Archive) -> dict[str, StoredTensor]:
    """Find the tensors of the model in a file: under "model", or all there is in a bare state dict."""
    tree = archive.tree
    found = tree.get("model", tree) if isinstance(tree, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(t, StoredTensor) for t in found.values()):
        raise archive.corrupt('holds no model: there is no "model" of tensors in it', "name a metaseq checkpoint")
    if not all(isinstance(name, str) and name.isprintable() for name in found):
        raise archive.corrupt("has a tensor whose name is not a text")
    return {clean(name): tensor for name, tensor in found.items()}


def outlier(values: Sequence[Hashable]) -> int | None:
    """Find the first value that differs from what most are."""
    usual = Counter(values).most_common(1)[0][0]
    return next((i for i, value in enumerate(values) if value != usual), None)


@dataclass(frozen=True)
class Header:
    """What one file says of itself, short of its numbers."""

    archive: Archive
    weights: Mapping[str, StoredTensor]
    units: tuple[Unit, ...]
    padding: Mapping[str, int]

    @staticmethod
    def read_all(paths: Iterable[Path]) -> list[Header]:
        """Read the headers of files of one checkpoint, which have most in common. Raises: as `read`."""
        first: Header | None = None
        headers = []
        for path in paths:
            headers.append(Header.read(Archive(path, like=first.archive if first else None), like=first))
            first = first or headers[0]
        return headers

    @staticmethod
    def read(archive: Archive, like: Header | None = None) -> Header:
        """Read what a file says, or take it from one that says the same.

        Raises: CheckpointCorrupt, CheckpointMismatch.
        """
        if like and _is_shared(archive, like.archive, "model"):
            if _is_shared(archive, like.archive, "shard_metadata"):
                return replace(like, archive=archive)
            weights = like.weights
        else:
            weights = weights_of(archive)
        metadata = archive.tree.get("shard_metadata")
        if metadata is None:
            return Header(archive, weights, (), {})
        try:
            units, padding = read_units(plain(metadata))
        except ValueError as error:
            raise archive.corrupt(str(error)) from None
        if like and units == like.units:
            units = like.units
        if any(unit.key in weights for unit in units):
            return Header(archive, weights, units, padding)
        return Header(archive, weights, relaid(units, {name: tensor.shape for name, tensor in weights.items()}), {})

    @cached_property
    def is_flat(self) -> bool:
        return any(unit.key in self.weights for unit in self.units) or any(map(is_flat, self.weights))

    @cached_property
    def cfg(self) -> dict[str, Any]:
        """The configuration it was trained with, as plain dicts; empty where it has none.

        Files older than cfg have the model's share of it under "args".
        """
        cfg, args = (plain(self.archive.tree.get(key)) for key in ("cfg", "args"))
        if isinstance(cfg, dict):
            return cfg
        return {"model": args} if isinstance(args, dict) else {}

    @cached_property
    def num_updates(self) -> int | None:
        """The step at which it was saved."""
        history = plain(self.archive.tree.get("optimizer_history"))
        last = history[-1] if isinstance(history, list) and history else None
        steps = last.get("num_updates") if isinstance(last, dict) else None
        return steps if isinstance(steps, int) else None

    @cached_property
    def model(self) -> Hashable:
        """What all files of one checkpoint have in common."""
        shapes: tuple[Any, ...]
        if self.is_flat and self.units:
            shapes = tuple((unit.key, unit.names, unit.shapes, self.weights.get(unit.key)) for unit in self.units)
            shapes = tuple((*s[:3], None if s[3] is None else (s[3].dtype, s[3].shape)) for s in shapes)
        else:
            tensors = sorted((n, t) for n, t in self.weights.items() if not is_ignored(n))
            shapes = tuple((name, t.shape, t.dtype) for name, t in tensors)
        model = self.cfg.get("model")
        named = model if isinstance(model, dict) else {}
        return shapes, *(str(named.get(key)) for key in ("decoder_attention_heads", "activation_fn"))


def _is_shared(one: Archive, two: Archive, key: str) -> bool:
    """Whether two files say the same under a key, as `Archive` found when it read the second."""
    trees = one.tree, two.tree
    return all(isinstance(tree, dict) and isinstance(tree.get(key), dict) for tree in trees) and (
        one.tree[key] is two.tree[key]
    )


def laid_out(headers: Sequence[Header]) -> list[Header]:
    """Give the shards of a part, which say nothing of what is in them, the units and padding that their lengths mean.

    Raises: CheckpointMismatch.
    """
    first = headers[0]
    lengths = {name: tensor.numel for name, tensor in first.weights.items() if not is_ignored(name)}
    units = bare_units(lengths, len(headers), first.cfg)
    if units is None:
        key, length = max(lengths.items(), key=lambda pair: (is_flat(pair[0]), pair[1]))
        raise CheckpointMismatch(
            f"{first.archive.path} holds flat parameters without shard_metadata, and {len(headers)} x {length} numbers "
            f"of {key} are those of no OPT that its cfg or a published size describes; put all shards of a part "
            "together, or use raw FSDP shards or unflattened weights"
        )
    out = []
    for shard, header in enumerate(headers):
        padding = {u.key: lengths[u.key] - len(held(u.numel, lengths[u.key], shard)) for u in units}
        for key, num_zeros in padding.items():
            if header.archive.flat(header.weights[key], lengths[key] - num_zeros, lengths[key]).any():
                raise header.archive.corrupt(f"ends {key} with {num_zeros} numbers too many that are not zeros")
        out.append(replace(header, units=units, padding=padding))
    return out


def check_same(headers: Sequence[Header]) -> None:
    """Raises: CheckpointMismatch naming a file that is of another model, or of another moment of the training."""
    for what, values in (
        ("is of another model than", [h.model for h in headers]),
        ("was saved at another update than", [h.num_updates for h in headers]),
    ):
        odd = outlier(values)
        if odd is not None:
            usual = next(i for i, value in enumerate(values) if value != values[odd])
            number = f" ({values[odd]} instead of {values[usual]})" if isinstance(values[odd], int) else ""
            raise CheckpointMismatch(
                f"{headers[odd].archive.path} {what} {headers[usual].archive.path}{number}; "
                "put the files of one checkpoint together"
            )


class Part:
    """What one tensor-parallel rank held: `tensors` by their names, and what else the first shard says."""

    def __init__(self, headers: Sequence[Header]) -> None:
        """Raises: CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt, naming the file."""
        check_same(headers)
        for header in headers:
            for tensor in header.weights.values():
                header.archive.check(tensor)
        if headers[0].is_flat and not headers[0].units:
            headers = laid_out(headers)
        self.headers = tuple(headers)
        self.first = headers[0]
        self.is_flat = self.first.is_flat
        if not self.is_flat and len(headers) > 1:
            raise CheckpointMismatch(
                f"{headers[1].archive.path} holds whole tensors, as does {self.first.archive.path}; "
                "these are parts (--input of reshard_mp), not shards of one part"
            )
        if self.is_flat:
            self._check_slices()

    @property
    def num_shards(self) -> int:
        return len(self.headers)

    @property
    def units(self) -> tuple[Unit, ...]:
        """Its FSDP units; the usual ones where the file does not say."""
        return self.first.units or units_of({name: t.shape for name, t in self.tensors.items()})

    @cached_property
    def shared(self) -> dict[str, str]:
        """Parameters that are another one, by the name they would be stored under: the tied output projection."""
        pairs = {dst: src for unit in self.first.units for src, dst in unit.shared}
        return pairs | ({OUTPUT: EMBED} if self._stores_tied_output else {})

    @property
    def _stores_tied_output(self) -> bool:
        """Where the output projection is stored whole, cfg or a common storage tells whether it is the embedding.

        A flat unit holds a shared parameter once, so that one found there is a parameter of its own. metaseq's
        stitching leaves one part's rows of it beside the whole embedding, which is never a parameter of its own.
        """
        weights, model = self.first.weights, self.first.cfg.get("model")
        if self.is_flat or OUTPUT not in weights:
            return False
        said = model.get("share_decoder_input_output_embed") if isinstance(model, dict) else None
        output, embed = weights[OUTPUT], weights.get(EMBED)
        broken = embed is not None and output.shape != embed.shape
        tied = bool(said) or (broken and said is None) or output == embed
        if tied and broken:
            shape, path = " x ".join(map(str, output.shape)), self.first.archive.path
            log.warning(
                "%s: %s is %s, a piece; it is tied to the embedding, which is read instead", path, OUTPUT, shape
            )
        return tied

    @cached_property
    def tensors(self) -> dict[str, LocalTensor]:
        """Parameters under their stored names, in the order of the file; a shared one under its first name only."""
        if not self.is_flat:
            names = [name for name in self.first.weights if not is_ignored(name)]
            return {name: self._whole(name) for name in names if name not in self.shared}
        out: dict[str, LocalTensor] = {}
        for unit in self.units:
            out |= FlatSlices(unit, tuple((h.archive, h.weights[unit.key]) for h in self.headers)).tensors()
        return out

    @cached_property
    def buffers(self) -> dict[str, LocalTensor]:
        """What is not a parameter: the version mark."""
        return {name: self._whole(name) for name in self.first.weights if is_ignored(name)}

    @cached_property
    def moments(self) -> dict[str, dict[str, LocalTensor]]:
        """The optimizer's vectors by kind (exp_avg, ...), and in each the parameters' own share by name.

        Raises: CheckpointMismatch where a vector is not as long as its unit.
        """
        out: dict[str, dict[str, LocalTensor]] = {}
        for index, unit in enumerate(self.units):
            states = [optimizer_entry(h, index) for h in self.headers]
            for kind in (k for k, value in states[0].items() if isinstance(value, StoredTensor) and value.shape):
                length = self.first.weights[unit.key].numel if self.is_flat else unit.numel
                stored = tuple(
                    (h.archive, _moment(h.archive, state.get(kind), f"{kind} of {unit.key}", length))
                    for h, state in zip(self.headers, states, strict=True)
                )
                out.setdefault(kind, {}).update(FlatSlices(unit, stored).tensors())
        return out

    def _whole(self, name: str) -> LocalTensor:
        stored = self.first.weights[name]
        run = Run(0, stored.numel, self.first.archive, stored, 0)
        return LocalTensor(name, stored.shape, stored.dtype, (run,) if stored.numel else ())

    def _check_slices(self) -> None:
        """Hold every slice against the metadata: their length, their padding, and whether all are there."""
        for unit in self.units:
            total, numel = 0, unit.numel
            for shard, header in enumerate(self.headers):
                slice_ = header.weights.get(unit.key)
                if slice_ is None or len(slice_.shape) != 1:
                    raise header.archive.corrupt(f"has no slice of {unit.key}, which its metadata lists")
                wanted = len(held(numel, slice_.numel, shard))
                holds = slice_.numel - header.padding[unit.key]
                if holds != wanted:
                    raise CheckpointMismatch(
                        f"{header.archive.path} holds {holds} numbers of {unit.key}, where shard {shard} with "
                        f"slices of {slice_.numel} has {wanted}; the shards' names or number are not those of the run"
                    )
                total += holds
            if total < numel:
                raise self._shard_missing(unit, total)
        listed = {unit.key for unit in self.units}
        for name in self.first.weights:
            if name not in listed and not is_ignored(name):
                raise CheckpointMismatch(f"{self.first.archive.path} holds {name}, which its metadata does not explain")

    def _shard_missing(self, unit: Unit, total: int) -> CheckpointNotFound:
        last = self.headers[-1].archive.path
        _, _, shard = numbers(last)
        missing = with_numbers(last, shard=(shard or 0) + 1) if shard is not None else last
        return CheckpointNotFound(
            f"{missing} is missing: {self.num_shards} shards hold {total} of the {unit.numel} numbers of {unit.key}; "
            "fetch the rest of the shards"
        )


def optimizer_state(header: Header) -> dict[str, Any] | None:
    """The `last_optimizer_state` of a file, or None: metaseq writes -1 where another rank keeps it."""
    state = header.archive.tree.get("last_optimizer_state")
    return state if isinstance(state, dict) else None


def optimizer_entry(header: Header, index: int) -> dict[str, Any]:
    """What the optimizer keeps of a unit; empty where there is nothing."""
    state = (optimizer_state(header) or {}).get("state")
    entry = state.get(index) if isinstance(state, dict) else None
    return entry if isinstance(entry, dict) else {}


def _moment(archive: Archive, tensor: Any, what: str, length: int) -> StoredTensor:
    if not isinstance(tensor, StoredTensor) or tensor.shape != (length,):
        raise CheckpointMismatch(
            f"{archive.path} has optimizer state {what} that is not {length} numbers long; "
            "leave it out with --skip-optimizer-state True"
        )
    archive.check(tensor)
    return tensor
