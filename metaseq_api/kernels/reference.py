"""What the kernels must give, in plain torch: slow, and plain to read. Tests and `gpu_check` hold the kernels to it.

Shapes: T rows of the step, B sequences that feed one token each, N blocks of a table, P blocks of the pool, H heads,
S tokens of a block, D head width, X = H * D.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
    relu: bool = False,
) -> Tensor:
    """relu?(x W^T + b) + residual, in fp32 and rounded once. Shapes: [1, I], [O, I], [O], [1, O] -> [1, O]."""
    y = x_1I.float() @ weight_OI.float().t()
    y = y if bias_O is None else y + bias_O.float()
    y = y.relu() if relu else y
    return (y if residual_1O is None else y + residual_1O.float()).to(x_1I.dtype)
