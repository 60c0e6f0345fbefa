"""Linear and embedding layers that hold one rank's slice of a weight, and take that slice by themselves when loaded.

Knows how each kind of layer is split over the tensor axis and what it owes to the other ranks. Does not know OPT, or
where the weights come from: a `Source` is anything that can read a range of one tensor.

Shapes: T tokens of the step, I inputs, O outputs, V vocabulary rows, E embedding width; _n marks this rank's share.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaseq_api.kernels import have_triton
from metaseq_api.kernels.native import Native, native_for
from metaseq_api.parallel.context import ParallelContext

LEAST_ROWS = 4
"""A CPU multiplies no fewer rows: for a single one oneDNN and MKL sum in another order, so that a row's bits would
depend on whether it has neighbours. From 2 rows on they did not, in any shape tried. Four cost no more than one (12
layers of 768 x 3072: fp32 6.7 ms instead of 8.2, bf16 3.3 instead of 3.6; 2 took 10.2 and 4.2; 2026-11-20, EPYC Zen 4).
"""
MOST_ROWS = 32
"""In bf16 on a CPU with AMX no more rows are multiplied at once: from 33 on oneDNN cuts the sum over the inputs by how
many rows and threads there are, into up to seven ways for one weight; 1 to 32 rows had the same bits in every shape
tried (2026-11-28, a Xeon with AMX; `test_same_bits`). Long prompts pay: 0.5 of the full rate, and it is still AMX.
"""


class Source(Protocol):
    """One whole tensor of a checkpoint, of which ranges can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        """The tensor narrowed to [start, stop) along dim, in its stored dtype, on the CPU."""
        ...


def read_whole(source: Source) -> Tensor:
    return source.read(0, 0, source.shape[0])


def kept_in(stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a linear layer that multiplies in `dtype` keeps a weight in."""
    own = native_for(dtype, device)
    return dtype if own is None else own.kept_in(stored, dtype)


class Linear(nn.Module):
    """y_TO = x_TI W_OI^T + b_O, whole on this rank; on a CPU the weight is packed once for its matrix kernels."""

    def __init__(self, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.context = context
        self.dtype = dtype
        self.weight: Tensor
        self.bias: Tensor | None = None
        self.packed = False
        self.native: Native | None = None
        self.num_outputs = 0
        self.most = _most_rows(context.device, dtype)

    def keep(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take these as this rank's weight and bias."""
        device = self.context.device
        self.bias = None if bias is None else bias.to(device, self.dtype).contiguous()
        self.num_outputs = len(weight)
        own = native_for(self.dtype, device)
        self.native = own if own is not None and own.takes(weight.shape[1], self.dtype) else None
        if self.native is not None:
            self.weight = self.native.pack(weight, self.dtype)
            return
        self.weight = weight.to(device, self.dtype).contiguous()
        if _packs(device, self.dtype):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self.packed = True

    def load(self, weights: Seq[Source], biases: Seq[Source]) -> None:
        """Take the whole of each source, stacked along the outputs."""
        self.keep(_cat([read_whole(w) for w in weights]), _cat([read_whole(b) for b in biases]) if biases else None)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Shapes: x [T, I] -> [T, O]. `activation` is none, relu or gelu (tanh form)."""
        if self.native is not None:
            y = self.native.linear(x, self.weight, self.num_outputs, self.bias, relu=activation == "relu")
            return F.gelu(y, approximate="tanh") if activation == "gelu" else y
        if self._few(x):
            return self.forward(_padded(x), activation)[: x.shape[0]]
        if self.most is not None and len(x) > self.most:
            parts: list[Tensor] = [self.forward(few, activation) for few in torch.split(x, self.most)]
            return torch.cat(parts)
        if x.is_cuda and len(x) == 1 and activation != "gelu" and have_triton():
            from metaseq_api.kernels.row_linear import row_linear  # needs Triton

            return row_linear(x, self.weight, self.bias, relu=activation == "relu")
        if x.is_cuda and activation == "relu" and self.bias is not None:
            return torch._addmm_activation(self.bias, x, self.weight.t())
        if self.packed and activation != "gelu":
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")
            return fused
        y = F.linear(x, self.weight, self.bias) if not self.packed else self.forward(x)
        if activation == "relu":
            return F.relu(y)
        return F.gelu(y, approximate="tanh") if activation == "gelu" else y

    @property
    def plain(self) -> bool:
        """Whether the weight lies as torch has it, [O, I]."""
        return self.native is None and not self.packed

    @property
    def takes_room(self) -> bool:
        """Whether `wide` may write into what it wrote into before."""
        return self.native is not None and self.context.tensor_size == 1

    def wide(self, x: Tensor, room: Tensor | None = None) -> Tensor:
        """forward(x), in fp32 where the sums are at hand in it, and then in `room` where it has so many rows."""
        if self.native is not None and self.takes_room:
            return self.native.linear(x, self.weight, self.num_outputs, self.bias, dtype=torch.float32, room=room)
        return self.forward(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + forward(x), in one kernel where there is one."""
        if self.native is not None:
            return self.native.linear(x, self.weight, self.num_outputs, self.bias, residual)
        if self._few(x):
            return Linear.add_to(self, _padded(residual), _padded(x))[: x.shape[0]]
        if self.most is not None and len(x) > self.most:
            pairs = zip(torch.split(residual, self.most), torch.split(x, self.most), strict=True)
            return torch.cat([Linear.add_to(self, r, few) for r, few in pairs])
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
            return y
        if x.is_cuda:  # bias in the product's own kernel
            return F.linear(x, self.weight, self.bias).add_(residual)
        return torch.addmm(residual, x, self.weight.t()) + self.bias if self.bias is not None else residual + self(x)

    def _few(self, x: Tensor) -> bool:
        return x.shape[0] < LEAST_ROWS and x.device.type == "cpu"


class ColumnLinear(Linear):
    """Outputs split: this rank computes y_TOn from the whole x_TI. Owes the others nothing."""

    def load(self, weights: Seq[Source], biases: Seq[Source]) -> None:
        """Take this rank's rows of each source, stacked: several sources make one fused layer."""
        self.keep(_cat([self._rows(w) for w in weights]), _cat([self._rows(b) for b in biases]) if biases else None)

    def _rows(self, source: Source) -> Tensor:
        return source.read(0, *self.context.span(source.shape[0]))


class RowLinear(Linear):
    """Inputs split: this rank holds W_OIn and x_TIn; the sum over ranks is the whole y_TO on each."""

    def load(self, weights: Seq[Source], biases: Seq[Source]) -> None:
        """Take this rank's columns; the bias is the driver's alone, so that it is added once."""
        (weight,) = weights
        bias = _cat([read_whole(b) for b in biases]) if biases and self.context.is_driver else None
        self.keep(weight.read(1, *self.context.span(weight.shape[1])), bias)

    def summed(self, x: Tensor) -> Tensor:
        """x W^T + b over all ranks. Shapes: [T, In] -> [T, O]."""
        return self.context.all_reduce(self(x))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b over all ranks; the driver alone brings residual and bias into the sum."""
        y = super().add_to(residual, x) if self.context.is_driver else self(x)
        return self.context.all_reduce(y)


class VocabEmbedding(nn.Module):
    """Token rows split over the ranks: looks tokens up, and, being tied, turns hidden states into logits."""

    def __init__(self, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.context = context
        self.output = ColumnLinear(context, dtype)
        self.table: Tensor
        self.start = 0

    def load(self, table: Source, output: Source | None) -> None:
        """Take this rank's rows of the table, and of the output projection where it is not tied."""
        self.start, stop = self.context.span(table.shape[0])
        rows = table.read(0, self.start, stop)
        self.table = rows.to(self.context.device, self.output.dtype)
        if output is None:  # kernels of our own pack what was stored, all others share the table, or pack it
            own = native_for(self.output.dtype, self.context.device)
            self.output.keep(self.table if own is None else rows, None)
        else:
            self.output.load([output], [])

    def forward(self, token_ids: Tensor) -> Tensor:
        """Shapes: [T] -> [T, E]."""
        if self.context.tensor_size == 1:
            return F.embedding(token_ids, self.table)
        local = token_ids - self.start
        mine = (local >= 0) & (local < self.table.shape[0])
        rows = F.embedding(local.where(mine, 0), self.table) * mine[:, None]
        return self.context.all_reduce(rows)

    def logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor | None:
        """Perhaps in `room`, earlier ones. Shapes: [T, E] -> [T, V] in fp32 on the driver, None elsewhere."""
        return self.joined(self.own_logits(hidden, room))

    def own_logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """Those of this rank's tokens, in fp32 where these are all. Shapes: [T, E] -> [T, Vn]."""
        own = self.output.wide(hidden, room)
        return own.float() if self.context.tensor_size == 1 else own

    def joined(self, own_logits: Tensor) -> Tensor | None:
        """All ranks' `own_logits` side by side. Shapes: [T, Vn] -> [T, V] in fp32 on the driver, None elsewhere."""
        parts = self.context.gather(own_logits)
        return None if parts is None else _cat(parts, dim=1).float()


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's own layout serves: 2 to 2.5 times faster at one row in fp32 (2026-11-20, EPYC Zen 5)."""
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return onednn and device.type == "cpu" and dtype != torch.float16


def _most_rows(device: torch.device, dtype: torch.dtype) -> int | None:
    """Of how many rows at most a product may be made for each to have its own bits, where that is bounded."""
    amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return MOST_ROWS if amx and dtype == torch.bfloat16 else None


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, LEAST_ROWS - x.shape[0]))


def _cat(parts: Seq[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
