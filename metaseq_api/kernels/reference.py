"""What the kernels must give, in plain torch: slow, and plain to read. Tests and `gpu_check` hold the kernels to it.

Shapes: T rows of the step, B sequences that feed one token each, N blocks of a table, P blocks of the pool, H heads,
S tokens of a block, D head width, X = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class NormWeights(NamedTuple):
    """A layer norm's."""

    weight: Tensor
    bias: Tensor
    eps: float


class DecodeAttention(Protocol):
    """The one signature of every way to do it."""

    def __call__(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        keys_PHSD: Tensor,
        values_PHSD: Tensor,
        *,
        rows_B: Tensor,
        tables_BN: Tensor,
        contexts_B: Tensor,
        scale: float,
        out_TX: Tensor,
    ) -> None: ...


class OneRow(Protocol):
    """The one signature of every way to multiply a single row."""

    def __call__(
        self,
        x_1I: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        residual_1O: Tensor | None = None,
        *,
        norm: NormWeights | None = None,
        relu: bool = False,
    ) -> Tensor: ...


class AddNorm(Protocol):
    """The one signature of every way to add and norm."""

    def __call__(self, x_TD: Tensor, y_TD: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the steps of a GPU are made of, beside torch's products of many rows."""

    decode_attention: DecodeAttention
    row_linear: OneRow
    add_norm: AddNorm


def decode_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    keys_PHSD: Tensor,
    values_PHSD: Tensor,
    *,
    rows_B: Tensor,
    tables_BN: Tensor,
    contexts_B: Tensor,
    scale: float,
    out_TX: Tensor,
) -> None:
    """Put row rows_B[b]'s key and value at position contexts_B[b] - 1 of sequence b, attend to all positions up to it,
    and write the result into the row of out_TX. A sequence of no tokens touches nothing but its row of zeros."""
    size = keys_PHSD.shape[2]
    for row, table_N, context in zip(rows_B.tolist(), tables_BN, contexts_B.tolist(), strict=True):
        if context == 0:
            out_TX[row] = 0
            continue
        block, offset = int(table_N[(context - 1) // size]), (context - 1) % size
        keys_PHSD[block, :, offset], values_PHSD[block, :, offset] = k_THD[row], v_THD[row]
        blocks = table_N[: -(-context // size)].long()
        k_HCD, v_HCD = (x[blocks].transpose(0, 1).flatten(1, 2)[:, :context].float() for x in (keys_PHSD, values_PHSD))
        s_HC = torch.einsum("hd,hcd->hc", q_THD[row].float(), k_HCD) * scale
        out_TX[row] = torch.einsum("hc,hcd->hd", s_HC.softmax(-1), v_HCD).flatten().to(out_TX.dtype)


def row_linear(
    x_1I: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_1O: Tensor | None = None,
    *,
    norm: NormWeights | None = None,
    relu: bool = False,
) -> Tensor:
    """relu?(norm?(x) W^T + b) + residual, in fp32, rounded at the end, and after a norm.

    Shapes: [1, I], [O, I], [O], [1, O] -> [1, O].
    """
    x_1I = x_1I if norm is None else _normed(x_1I, norm)
    y = x_1I.float() @ weight_OI.float().t()
    y = y if bias_O is None else y + bias_O.float()
    y = y.relu() if relu else y
    return (y if residual_1O is None else y + residual_1O.float()).to(x_1I.dtype)


def add_norm(x_TD: Tensor, y_TD: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]:
    """x + y, rounded, and the layer norm of that. Shapes: [T, D] each -> [T, D], [T, D]."""
    sum_TD = x_TD + y_TD
    return sum_TD, _normed(sum_TD, norm)


def _normed(x_TD: Tensor, norm: NormWeights) -> Tensor:
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x_TD.float(), weight.shape, weight, bias, norm.eps).to(x_TD.dtype)


PLAIN = Kernels(decode_attention=decode_attention, row_linear=row_linear, add_norm=add_norm)
