"""A model's tensors as each of any number of parts holds them, whatever files they come from.

Knows the tensor-parallel split and how metaseq stores q, k and v. Does not know files, or what is written around them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.contents import Form, NewPart
from metaseq_api.checkpoint.flat import units_of
from metaseq_api.checkpoint.part import Part
from metaseq_api.checkpoint.rest import Source, rest_of_part, rest_of_whole
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.checkpoint.write import CHUNK


class Boxed(Protocol):
    """A tensor of the whole model, of which any box can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def split(self) -> int | None: ...

    def box(self, rows: range, columns: range) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Recut:
    """One part's share of a whole stored tensor, `thirds` its logical tensors (one, or three of a fused qkv_proj)."""

    thirds: tuple[Boxed, ...]
    part: int
    num_parts: int

    @property
    def dtype(self) -> torch.dtype:
        return self.thirds[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self._extent(self.thirds[0])
        return (len(rows) * len(self.thirds), len(columns))[: len(self.thirds[0].shape)]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def flat(self, start: int, stop: int) -> Iterator[Tensor]:
        """Copy numbers start to stop of the share, a block of rows at a time."""
        for index, tensor in enumerate(self.thirds):
            rows, columns = self._extent(tensor)
            width, each = len(columns), len(rows) * len(columns)
            at, end = max(start - index * each, 0), min(stop - index * each, each)
            step = max(1, CHUNK // (width * self.dtype.itemsize))
            for row in range(at // width, -(-end // width) if end > at else 0, step):
                last = min(row + step, -(-end // width))
                block = tensor.box(rows[row:last], columns).reshape(-1)
                yield block[max(at - row * width, 0) : end - row * width]

    def _extent(self, tensor: Boxed) -> tuple[range, range]:
        extents = [range(n) for n in (*tensor.shape, 1)[:2]]
        if tensor.split is not None:
            each = tensor.shape[tensor.split] // self.num_parts
            extents[tensor.split] = range(self.part * each, (self.part + 1) * each)
        return extents[0], extents[1]


def same_part(part: Part, form: Form) -> NewPart:
    """A part as it is."""
    moments = {} if form.skip_optimizer_state else part.moments
    return NewPart(tensors=part.tensors, moments=moments, units=part.units, rest=rest_of_part(part))


def cut_parts(checkpoint: Checkpoint | WholeCheckpoint, num_parts: int, form: Form) -> list[NewPart]:
    """Cut a model into parts that its sizes allow."""
    if isinstance(checkpoint, Checkpoint):
        fused = any(".qkv_proj." in name for name in checkpoint.parts[0].tensors)
        if num_parts == checkpoint.num_parts and form.fused_qkv in (None, fused):
            return [same_part(part, form) for part in checkpoint.parts]
        return [_recut(checkpoint, index, num_parts, form) for index in range(num_parts)]
    vectors = {} if form.skip_optimizer_state else checkpoint.moments()
    return [_made(checkpoint, vectors, index, num_parts, form) for index in range(num_parts)]


def _recut(checkpoint: Checkpoint, index: int, num_parts: int, form: Form) -> NewPart:
    like = checkpoint.parts[0]
    whole = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    tensors = _cut(_named(like.tensors, form.fused_qkv), whole, index, num_parts)
    vectors = {} if form.skip_optimizer_state else checkpoint.moments()
    groups = [(unit, _named(unit.names, form.fused_qkv)) for unit in like.units]
    return NewPart(
        tensors=tensors,
        moments={kind: _cut(tensors, of_kind, index, num_parts) for kind, of_kind in vectors.items()},
        units=tuple(replace(u, names=tuple(ns), shapes=tuple(tensors[n].shape for n in ns)) for u, ns in groups),
        rest=rest_of_part(like),
        num_parts=num_parts,
    )


def _made(
    checkpoint: WholeCheckpoint, vectors: Mapping[str, Mapping[str, Boxed]], index: int, num_parts: int, form: Form
) -> NewPart:
    """As metaseq would have it: fused, but for the 350M shape, which it trained in one part with q, k and v apart."""
    fused = not checkpoint.config.has_projection if form.fused_qkv is None else form.fused_qkv
    names = _named(sorted(checkpoint.names(), key=rules.registered), fused)
    tensors = _cut(names, checkpoint.tensors, index, num_parts)
    units = units_of({name: tensor.shape for name, tensor in tensors.items()})
    return NewPart(
        tensors=tensors,
        moments={kind: _cut(names, of_kind, index, num_parts) for kind, of_kind in vectors.items()},
        units=units,
        rest=rest_of_whole(checkpoint, len(units), list(vectors)),
        num_parts=num_parts,
    )


def _cut(stored: Iterable[str], whole: Mapping[str, Boxed], index: int, num_parts: int) -> dict[str, Source]:
    """Each stored tensor's share, of those whose logical tensors are there."""
    thirds = {name: rules.logical_names(name) for name in stored}
    there = {name: logical for name, logical in thirds.items() if all(n in whole for n in logical)}
    return {name: Recut(tuple(whole[n] for n in logical), index, num_parts) for name, logical in there.items()}


def _named(stored: Iterable[str], fused: bool | None) -> Sequence[str]:
    """The stored names with q, k and v in one tensor or apart, in the place of the first of them."""
    if fused is None:
        return list(stored)
    names = rules.fused_name if fused else rules.logical_names
    return list(dict.fromkeys(name for one in stored for name in names(one)))
