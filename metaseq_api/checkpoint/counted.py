"""A checkpoint that tells how many bytes of it were read, for whoever shows progress.

Knows which tensors are split over ranks. Does not know which of them a rank takes first, or what it does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.tensors import LogicalTensor
from metaseq_api.checkpoint.whole import BoxedTensor, WholeCheckpoint
from metaseq_api.progress import Progress


@dataclass(frozen=True, slots=True)
class Counted:
    """The same tensors; `told` hears of the bytes of each slice once it was read, each read is within a `timed`."""

    checkpoint: Checkpoint | WholeCheckpoint
    told: Progress
    timed: Callable[[], AbstractContextManager[object]] = nullcontext

    def tensor(self, name: str) -> CountedTensor:
        return CountedTensor(self.checkpoint.tensor(name), self.told, self.timed)


@dataclass(frozen=True, slots=True)
class CountedTensor:
    source: LogicalTensor | BoxedTensor
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


def driver_bytes(checkpoint: Checkpoint | WholeCheckpoint, num_ranks: int) -> int:
    """How many bytes of the files the first of so many ranks reads: its share of what is split, and all of the rest.

    The others read as much but for the biases of row-split layers, which the driver alone adds.
    """
    total = 0
    for name in checkpoint.names():
        tensor: LogicalTensor | BoxedTensor = checkpoint.tensor(name)
        total += tensor.numel * tensor.dtype.itemsize // (1 if tensor.split is None else num_ranks)
    return total
