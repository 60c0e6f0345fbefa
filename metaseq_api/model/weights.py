"""Weights that do not come from files: tensors at hand, or random ones of any published shape.

Knows the names and shapes of a whole model's tensors. Does not know how a checkpoint stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.core.config import tensor_shapes


@dataclass(frozen=True, slots=True)
class Whole:
    """A Source over a tensor at hand."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        return self.value.narrow(dim, start, stop - start)


class TensorWeights:
    """Weights from a mapping of metaseq's names (q, k and v apart) to whole tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def tensor(self, name: str) -> Whole:
        return Whole(self._tensors[name])


class RandomWeights:
    """Normal weights of one shape, made when read: the same for every rank and tensor-parallel size, no file needed."""

    def __init__(self, config: ModelConfig, *, seed: int = 0, std: float = 0.02) -> None:
        self._shapes = tensor_shapes(config)
        self._seed, self._std = seed, std

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def tensor(self, name: str) -> Whole:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + sorted(self._shapes).index(name))
        value = torch.randn(self._shapes[name], generator=generator) * self._std
        return Whole(value + 1 if "norm.weight" in name else value)
