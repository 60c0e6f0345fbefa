"""All layers of a model in one call, on a CPU with kernels of our own; each half of one where ranks sum over sockets.

Called one by one from Python, the parts of twelve layers took 4 ms of a step's 18 (one stream of OPT-125M in bf16).

Knows where weights and the cache lie. Does not know what a part does: the order of operations stands in
`model.opt.Layer` for all other ways, in kernels/cpu/layers.c for this one.

Shapes: T tokens of the step, R rows whose logits are wanted, D model width, F ffn rows of this rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.kernels.native import Native
from metaseq_api.kernels.structs import STORED, Layer
from metaseq_api.kernels.structs import Stack as Addresses
from metaseq_api.model.cache import KVCache
from metaseq_api.model.native import NativePlan
from metaseq_api.parallel.context import ParallelContext


class Part(Protocol):
    """A linear layer or a norm."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def native(self) -> Native | None:
        """What computes it, if that is not torch."""
        ...


Parts = Seq[Part | None]
"""Of one layer, in the order of `kernels.structs.Layer`, None where there is none."""


class Stack:
    """Layers as addresses; what lies there must outlive it."""

    def __init__(self, config: ModelConfig, context: ParallelContext, layers: Seq[Parts]) -> None:
        self.context = context
        self.layers = (Layer * len(layers))(*(Layer(*_addresses(parts)) for parts in layers))
        self.cache: KVCache | None = None
        self.room: Tensor | None = None  # the longest step's: fresh pages take longer than some parts
        self.addresses = Addresses(
            layers=self.layers,
            num_layers=len(layers),
            width=config.hidden_dim,
            ffn=config.ffn_dim // context.tensor_size,
            eps=config.norm_eps,
            pre_norm=config.pre_norm,
            residual=context.is_driver,
        )

    def run(self, x_TD: Tensor, plan: NativePlan, cache: KVCache) -> Tensor:
        """Up to the last product: a norm after it (350M) is the caller's. Shapes: x [T, D], overwritten -> [R, D]."""
        if cache is not self.cache:
            self.cache = cache
            for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
                layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        (num, width), step, wanted_R = x_TD.shape, plan.step, plan.logit_rows
        inner = step.heads * step.dim
        step.scale, step.stride = step.dim**-0.5, 3 * inner
        self.addresses.step, self.addresses.bytes = ctypes.pointer(step), x_TD.itemsize
        if self.room is None or len(self.room) < num:
            self.room = torch.empty(num, width + 4 * inner + self.addresses.ffn, dtype=x_TD.dtype)
        self._run(plan.native, x_TD, self.room, wanted_R)
        return x_TD[: len(wanted_R)]

    def _run(self, native: Native, x_TD: Tensor, room: Tensor, wanted_R: Tensor) -> None:
        """All halves of layers, each with its sum over the ranks: in the same call where that can be."""
        memory, num = self.context.memory, 2 * len(self.layers)
        at_once = memory is not None and memory.takes(x_TD)
        self.addresses.ranks = None
        if memory is not None and at_once:
            memory.hear()  # what was said last: a kernel says the next
            self.addresses.ranks = ctypes.pointer(memory.state)
        together = num if at_once or self.context.tensor_size == 1 else 1
        done = 0
        while done < num:
            now = native.layers(self.addresses, range(done, min(done + together, num)), x_TD, room, wanted_R)
            done = abs(now)
            sums = x_TD if done < num - 1 else x_TD[: len(wanted_R)]
            if now < 0 and memory is not None:
                memory.hear_sum(sums)
            elif not at_once and len(sums) > 0:
                self.context.all_reduce(sums)


def stack(config: ModelConfig, context: ParallelContext, layers: Seq[Parts]) -> Stack | None:
    """None where torch computes some of it."""
    own = all(part.native is not None for parts in layers for part in parts if part is not None)
    return Stack(config, context, layers) if own and config.activation == "relu" else None


def _addresses(parts: Parts) -> list[int | None]:
    return [n for part in parts for n in ((None, None, 0) if part is None else _numbers(part.weight, part.bias))]


def _numbers(weight: Tensor, bias: Tensor | None) -> tuple[int, int | None, int]:
    assert weight.is_contiguous()
    assert bias is None or bias.is_contiguous()
    return weight.data_ptr(), None if bias is None else bias.data_ptr(), STORED[weight.dtype]
