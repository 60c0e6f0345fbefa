"""Tensors that lie in files, whole or in pieces, and are copied out by rows and columns.

A LocalTensor is one part's parameter, in runs over one or more shards; a LogicalTensor is the whole model's, over all
parts. Both touch only the pages that hold what is asked for. Does not know names' meaning or how files are found.

Shapes: a vector is a matrix of one column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.unpickle import StoredTensor


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive numbers of a parameter: `len` of them from its `start` on, at `offset` of a stored tensor."""

    start: int
    len: int
    archive: Archive
    stored: StoredTensor
    offset: int

    @property
    def stop(self) -> int:
        return self.start + self.len

    def view(self, start: int, stop: int) -> Tensor:
        """Map numbers start to stop of the parameter, which this run holds."""
        at = self.offset + start - self.start
        return self.archive.flat(self.stored, at, at + stop - start)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A parameter of one part. `runs` follow one another and hold it all."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_columns(self) -> int:
        return math.prod(self.shape[1:])

    def flat(self, start: int, stop: int) -> Iterator[Tensor]:
        """Map numbers start to stop, in order, without copying."""
        for run in self.runs:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                yield run.view(first, last)

    def read_into(self, out: Tensor, row: int, column: int) -> None:
        """Copy the box that begins at (row, column) and has the size of `out` [rows, columns]."""
        width = self.num_columns
        num_rows, num_columns = out.shape
        at = row * width
        if num_columns == width and out.is_contiguous():
            self._fill(out.view(-1), at)
            return
        for piece in self.flat(at, (row + num_rows) * width):
            _copy_columns(out, piece, at - row * width, width, column, num_columns)
            at += len(piece)

    def _fill(self, out: Tensor, start: int) -> None:
        """Read numbers from `start` on straight into `out`: cheaper than to map pages that are wanted whole."""
        for run in self.runs:
            first, last = max(start, run.start), min(start + len(out), run.stop)
            if first < last:
                run.archive.fill(out[first - start : last - start], run.stored, run.offset + first - run.start)


def _copy_columns(out: Tensor, piece: Tensor, at: int, width: int, column: int, num_columns: int) -> None:
    """Copy what a piece of whole rows' numbers, `at` numbers after the first row's begin, holds of the wanted columns.

    A piece may begin and end in the middle of a row.
    """
    stop = at + len(piece)
    while at < stop:
        row, begin = divmod(at, width)
        if begin == 0 and stop - at >= width:
            whole = (stop - at) // width
            block = piece[: whole * width].view(whole, width)
            out[row : row + whole] = block[:, column : column + num_columns]
            taken = whole * width
        else:
            taken = min(width - begin, stop - at)
            first, last = max(begin, column), min(begin + taken, column + num_columns)
            if first < last:
                out[row, first - column : last - column] = piece[first - begin : last - begin]
        piece, at = piece[taken:], at + taken


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor of the whole model. `sources` are its parts' local tensors, each with the row its share begins at;
    there is one source where every part holds it all (`split` None).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: int | None
    sources: tuple[tuple[LocalTensor, int], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """Copy the slice [start, stop) along `dim` into a fresh tensor of the stored dtype."""
        assert 0 <= dim < len(self.shape), f"{self.name} has no dimension {dim}"
        assert 0 <= start <= stop <= self.shape[dim], f"{self.name} has {self.shape[dim]} of dimension {dim}"
        box = [range(size) for size in self.shape]
        box[dim] = range(start, stop)
        return self.box(box[0], box[1] if len(box) > 1 else range(1)).reshape([len(r) for r in box])

    def box(self, rows: range, columns: range) -> Tensor:
        """Copy a box. Shapes: [rows, columns], also of a vector."""
        out = torch.empty((len(rows), len(columns)), dtype=self.dtype)
        for index, (local, row) in enumerate(self.sources):
            mine = self._share(index)
            wanted_rows, wanted_columns = _overlap(rows, mine[0]), _overlap(columns, mine[1])
            target = out[_within(wanted_rows, rows), _within(wanted_columns, columns)]
            if target.numel():
                local.read_into(target, row + wanted_rows.start - mine[0].start, wanted_columns.start - mine[1].start)
        return out

    def read_all(self) -> Tensor:
        """Copy the whole tensor."""
        return self.read(0, 0, self.shape[0])

    def _share(self, index: int) -> tuple[range, range]:
        """Rows and columns that one source holds."""
        extents = [range(self.shape[0]), range(self.shape[1] if len(self.shape) > 1 else 1)]
        if self.split is not None:
            each = self.shape[self.split] // len(self.sources)
            extents[self.split] = range(index * each, (index + 1) * each)
        return extents[0], extents[1]


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def _within(inner: range, outer: range) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)
