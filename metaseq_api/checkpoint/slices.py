"""A flat parameter's slices, and its parameters' numbers in them. Does not know metadata, or what a file holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.flat import Unit
from metaseq_api.checkpoint.tensors import LocalTensor, Run
from metaseq_api.checkpoint.unpickle import StoredTensor


@dataclass(frozen=True, slots=True)
class FlatSlices:
    """A unit's slices, one of each shard in order, padding at the end of each."""

    unit: Unit
    stored: tuple[tuple[Archive, StoredTensor], ...]

    def tensors(self) -> dict[str, LocalTensor]:
        """Find the unit's parameters in the slices."""
        length = self.stored[0][1].numel
        starts = accumulate(self.unit.numels, initial=0)
        return {
            name: self._tensor(name, shape, start, length)
            for name, shape, start in zip(self.unit.names, self.unit.shapes, starts, strict=False)
        }

    def _tensor(self, name: str, shape: tuple[int, ...], start: int, length: int) -> LocalTensor:
        stop = start + math.prod(shape)
        runs = []
        for shard in range(start // length, -(-stop // length)) if length else ():
            first, last = max(start, shard * length), min(stop, (shard + 1) * length)
            archive, stored = self.stored[shard]
            runs.append(Run(first - start, last - first, archive, stored, first - shard * length))
        return LocalTensor(name, shape, self.stored[0][1].dtype, tuple(runs))
