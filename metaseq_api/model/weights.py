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


class DeviceWeights:
    """Normal weights of one shape, made on the device when read: for a model too large to make elsewhere and send."""

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, *, seed: int = 0, std: float = 0.02
    ) -> None:
        self._shapes = tensor_shapes(config)
        self._numbers = {name: number for number, name in enumerate(sorted(self._shapes))}
        self._device, self._dtype, self._seed, self._std = device, dtype, seed, std

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def tensor(self, name: str) -> Whole:
        generator = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + self._numbers[name])
        value = torch.randn(self._shapes[name], generator=generator, device=self._device, dtype=self._dtype)
        return Whole(value.mul_(self._std).add_(1 if "norm.weight" in name else 0))
