"""A model's weights as whoever loads them sees them, and how many bytes of them were read, for whoever shows progress.

Knows which tensors are split over ranks. Does not know which of them a rank takes first, or what it does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.progress import Progress


class Readable(Protocol):
    """One whole tensor, of which ranges can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def numel(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def split(self) -> int | None:
        """Along which dimension ranks share it."""
        ...

    def read(self, dim: int, start: int, stop: int) -> Tensor: ...


class Loadable(Protocol):
    """One model's weights: a Checkpoint, a WholeCheckpoint, or what was never in a file."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def num_parts(self) -> int: ...
    @property
    def num_shards(self) -> int: ...

    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> Readable: ...


@dataclass(frozen=True, slots=True)
class Counted:
    """The same tensors; `told` hears of the bytes of each slice once it was read, each read is within a `timed`."""

    checkpoint: Loadable
    told: Progress
    timed: Callable[[], AbstractContextManager[object]] = nullcontext

    def tensor(self, name: str) -> CountedTensor:
        return CountedTensor(self.checkpoint.tensor(name), self.told, self.timed)


@dataclass(frozen=True, slots=True)
class CountedTensor:
    source: Readable
    told: Progress
    timed: Callable[[], AbstractContextManager[object]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        with self.timed():
            out = self.source.read(dim, start, stop)
        self.told(out.nbytes)
        return out


def driver_bytes(checkpoint: Loadable, num_ranks: int) -> int:
    """How many bytes of the files the first of so many ranks reads: its share of what is split, and all of the rest.

    The others read as much but for the biases of row-split layers, which the driver alone adds.
    """
    total = 0
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        total += tensor.numel * tensor.dtype.itemsize // (1 if tensor.split is None else num_ranks)
    return total
