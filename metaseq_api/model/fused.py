"""All layers of a step as a GPU runs them: a norm goes with the sum before it, and of a single row with the product
after it, so that a layer of one row is five kernels (six where contexts are cut), and one of many seven or eight.

Knows the order of operations of layers whose norms come first; `model.opt.Layer` has it for all other ways. Does not
know which kernels these are (a step's plan names them), or how the model's parts were loaded.

Shapes: T tokens of the step, R rows whose logits are wanted, D model width, H heads of this rank, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from torch import Tensor

from metaseq_api.kernels.reference import NormWeights
from metaseq_api.model.cache import KVCache
from metaseq_api.model.paged import PagedPlan, attend_paged
from metaseq_api.parallel.layers import ColumnLinear, RowLinear


class Norm(Protocol):
    """A layer norm, by itself, or its weights for a kernel that norms."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def weights(self) -> NormWeights: ...


class Parts(NamedTuple):
    """Of one layer, in the order in which they are run."""

    attn_norm: Norm
    qkv: ColumnLinear
    out: RowLinear
    ffn_norm: Norm
    fc1: ColumnLinear
    fc2: RowLinear

    @property
    def plain(self) -> bool:
        """Whether all weights lie as torch has them."""
        return all(part.plain for part in (self.qkv, self.out, self.fc1, self.fc2))


def run(
    layers: Seq[Parts], x_TD: Tensor, plan: PagedPlan, cache: KVCache, rows: Tensor | None, activation: str
) -> Tensor:
    """The last layer, once it has attended, goes on with `rows` alone, where they are not all. Shapes: -> [R, D]."""
    if len(x_TD) == 1 and rows is None and activation != "gelu" and layers[0].plain:
        for index, parts in enumerate(layers):
            x_TD = _one_row(parts, x_TD, plan, cache, index, relu=activation == "relu")
        return x_TD
    return _many_rows(layers, x_TD, plan, cache, rows, activation)


def _one_row(parts: Parts, x_1D: Tensor, plan: PagedPlan, cache: KVCache, index: int, *, relu: bool) -> Tensor:
    one_row = plan.kernels.row_linear

    def summed(part: RowLinear, x: Tensor) -> Tensor:
        residual = x_1D if part.context.is_driver else None  # once in the sum over all ranks
        return part.context.all_reduce(one_row(x, part.weight, part.bias, residual))

    qkv_1X = one_row(x_1D, parts.qkv.weight, parts.qkv.bias, norm=parts.attn_norm.weights)
    x_1D = summed(parts.out, _attended(qkv_1X, plan, cache, index))
    h_1F = one_row(x_1D, parts.fc1.weight, parts.fc1.bias, norm=parts.ffn_norm.weights, relu=relu)
    return summed(parts.fc2, h_1F)


def _many_rows(
    layers: Seq[Parts], x_TD: Tensor, plan: PagedPlan, cache: KVCache, rows: Tensor | None, activation: str
) -> Tensor:
    add_norm = plan.kernels.add_norm
    y_TD: Tensor | None = None  # of the layer before, still to be added
    for index, parts in enumerate(layers):
        if y_TD is None:
            normed_TD = parts.attn_norm(x_TD)
        else:
            x_TD, normed_TD = add_norm(x_TD, y_TD, parts.attn_norm.weights)
        attended_TX = _attended(parts.qkv(normed_TD), plan, cache, index)
        if rows is not None and index == len(layers) - 1:
            x_TD, attended_TX = x_TD.index_select(0, rows), attended_TX.index_select(0, rows)
            if len(x_TD) == 0:
                return x_TD
        x_TD, normed_TD = add_norm(x_TD, parts.out.summed(attended_TX), parts.ffn_norm.weights)
        y_TD = parts.fc2.summed(parts.fc1(normed_TD, activation))
    return x_TD if y_TD is None else x_TD + y_TD


def _attended(qkv_TX: Tensor, plan: PagedPlan, cache: KVCache, index: int) -> Tensor:
    _, heads, _, width = cache.keys[index].shape
    q_THK, k_THK, v_THK = qkv_TX.view(-1, 3, heads, width).unbind(1)
    return attend_paged(q_THK, k_THK, v_THK, layer=index, plan=plan, cache=cache, scale=width**-0.5)
