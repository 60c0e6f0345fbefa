"""OPT, every published size, on one rank's slice of the weights.

Knows the order of operations (facts of metaseq's decoder and Hugging Face's OPT agree on it). Does not know files,
scheduling or sampling. Source: metaseq/models/transformer_decoder.py, modules/transformer_decoder_layer.py.

Shapes: T tokens of the step (all sequences end to end), R rows whose logits are wanted, E embedding width, D model
width, H heads of this rank, K head width, F ffn rows of this rank, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaseq_api.core import ModelConfig
from metaseq_api.core.config import POSITION_OFFSET
from metaseq_api.kernels.native import native_for
from metaseq_api.kernels.reference import NormWeights
from metaseq_api.model import fused
from metaseq_api.model.cache import KVCache
from metaseq_api.model.native import NativePlan
from metaseq_api.model.paged import PagedPlan
from metaseq_api.model.paths import Plan, attend_by
from metaseq_api.model.stack import Stack, stack
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.parallel.layers import ColumnLinear, Linear, RowLinear, Source, VocabEmbedding, read_whole


class Weights(Protocol):
    """A checkpoint as the model sees it: whole tensors by metaseq's names, q, k and v apart."""

    def tensor(self, name: str) -> Source: ...


class Norm(nn.Module):
    """Layer norm with fp32 statistics, replicated on every rank."""

    def __init__(self, context: ParallelContext, dtype: torch.dtype, eps: float) -> None:
        super().__init__()
        self.context, self.dtype, self.eps = context, dtype, eps
        self.weight: Tensor
        self.bias: Tensor
        self.native = native_for(dtype, context.device)

    def load(self, weights: Weights, name: str) -> None:
        self.weight, self.bias = (
            read_whole(weights.tensor(f"{name}.{leaf}")).to(self.context.device, self.dtype)
            for leaf in ("weight", "bias")
        )

    @property
    def weights(self) -> NormWeights:
        return NormWeights(self.weight, self.bias, self.eps)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.native is not None:
            return self.native.norm(x_TD, self.weight, self.bias, self.eps)
        return F.layer_norm(x_TD, self.weight.shape, self.weight, self.bias, self.eps)


class Layer(nn.Module):
    """Attention and ffn around a residual; the norms before them, or (350M) after the sum."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.num_heads = config.num_heads // context.tensor_size
        self.qkv = ColumnLinear(context, dtype)
        self.out = RowLinear(context, dtype)
        self.fc1 = ColumnLinear(context, dtype)
        self.fc2 = RowLinear(context, dtype)
        self.attn_norm = Norm(context, dtype, config.norm_eps)
        self.ffn_norm = Norm(context, dtype, config.norm_eps)

    def load(self, weights: Weights) -> None:
        """Take this rank's slice; the layer's own `final_layer_norm` is the one before the ffn."""
        prefix = f"decoder.layers.{self.index}"
        attn = f"{prefix}.self_attn"
        qkv = [f"{attn}.{x}_proj" for x in "qkv"]
        for module, names in (
            (self.qkv, qkv),
            (self.out, [f"{attn}.out_proj"]),
            (self.fc1, [f"{prefix}.fc1"]),
            (self.fc2, [f"{prefix}.fc2"]),
        ):
            biases = [weights.tensor(f"{n}.bias") for n in names] if self.config.bias else []
            module.load([weights.tensor(f"{n}.weight") for n in names], biases)
        self.attn_norm.load(weights, f"{prefix}.self_attn_layer_norm")
        self.ffn_norm.load(weights, f"{prefix}.final_layer_norm")

    @property
    def parts(self) -> fused.Parts:
        return fused.Parts(self.attn_norm, self.qkv, self.out, self.ffn_norm, self.fc1, self.fc2)

    def forward(self, x_TD: Tensor, plan: Plan, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        """Shapes: [T, D] -> [T, D], or of the last layer [R, D], only the rows that are wanted."""
        attended_TX = self._attend(self.attn_norm(x_TD) if self.config.pre_norm else x_TD, plan, cache)
        if rows is not None:
            x_TD, attended_TX = x_TD.index_select(0, rows), attended_TX.index_select(0, rows)
        if len(x_TD) == 0:
            return x_TD
        x_TD = self.out.add_to(x_TD, attended_TX)
        if self.config.pre_norm:
            return self._ffn(x_TD, self.ffn_norm(x_TD))
        x_TD = self.attn_norm(x_TD)
        normed: Tensor = self.ffn_norm(self._ffn(x_TD, x_TD))
        return normed

    def _attend(self, x_TD: Tensor, plan: Plan, cache: KVCache) -> Tensor:
        q_THK, k_THK, v_THK = self.qkv(x_TD).view(-1, 3, self.num_heads, self.config.head_dim).unbind(1)
        scale = self.config.head_dim**-0.5
        return attend_by(q_THK, k_THK, v_THK, layer=self.index, plan=plan, cache=cache, scale=scale)

    def _ffn(self, residual_TD: Tensor, x_TD: Tensor) -> Tensor:
        summed: Tensor = self.fc2.add_to(residual_TD, self.fc1(x_TD, self.config.activation))
        return summed


class OPT(nn.Module):
    """The decoder, from token ids to the logits of the rows that are wanted."""

    def __init__(self, config: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        config.check_parallel(context.tensor_size)
        self.config, self.context, self.dtype = config, context, dtype
        self.embed = VocabEmbedding(context, dtype)
        self.positions: Tensor
        self.project_in = Linear(context, dtype)
        self.project_out = Linear(context, dtype)
        self.layers = nn.ModuleList(Layer(config, context, dtype, i) for i in range(config.num_layers))
        self.norm = Norm(context, dtype, config.norm_eps)
        self.fused = [layer.parts for layer in self.layers if isinstance(layer, Layer)]
        self.stack: Stack | None = None

    def load(self, weights: Weights) -> None:
        """Read this rank's slice of every tensor, each once."""
        output = None if self.config.tied_output else weights.tensor("decoder.output_projection.weight")
        self.embed.load(weights.tensor("decoder.embed_tokens.weight"), output)
        positions = read_whole(weights.tensor("decoder.embed_positions.weight"))
        self.positions = positions[POSITION_OFFSET:].to(self.context.device, self.dtype)
        if self.config.has_projection:
            self.project_in.load([weights.tensor("decoder.project_in_dim.weight")], [])
            self.project_out.load([weights.tensor("decoder.project_out_dim.weight")], [])
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.load(weights)
        if self.config.final_norm:
            self.norm.load(weights, "decoder.layer_norm")
        self.stack = stack(self.config, self.context, self._parts())

    def forward(self, plan: Plan, cache: KVCache) -> Tensor:
        """Run a step. Shapes: -> [R, E], the hidden rows whose logits are wanted."""
        if plan.half_filled is not None:
            cache.clear(plan.half_filled)
        x_RD = self._through_layers(self._embedded(plan), plan, cache)
        if self.config.final_norm:
            x_RD = self.norm(x_RD)
        x_RE: Tensor = self.project_out(x_RD) if self.config.has_projection else x_RD
        return x_RE

    def _embedded(self, plan: Plan) -> Tensor:
        """Shapes: -> [T, D]."""
        if isinstance(plan, NativePlan) and self.context.tensor_size == 1 and not self.config.has_projection:
            return plan.native.embed(plan.token_ids_T, plan.positions_T, self.embed.table, self.positions)
        x = self.embed(plan.token_ids_T)
        if self.config.has_projection:
            x = self.project_in(x)
        x_TD: Tensor = x + F.embedding(plan.positions_T, self.positions)
        return x_TD

    def _parts(self) -> list[tuple[Linear | Norm | None, ...]]:
        """Of each layer in the order in which they are run; a norm after a layer is the next one's first part."""
        found: list[tuple[Linear | Norm | None, ...]] = []
        before: Norm | None = None
        for layer in self.layers:
            assert isinstance(layer, Layer)
            norms = (layer.attn_norm, layer.ffn_norm) if self.config.pre_norm else (before, layer.attn_norm)
            found.append((norms[0], layer.qkv, layer.out, norms[1], layer.fc1, layer.fc2))
            before = layer.ffn_norm
        return found

    def _through_layers(self, x_TD: Tensor, plan: Plan, cache: KVCache) -> Tensor:
        """Shapes: [T, D] -> [R, D]; the last layer goes on with the rows that are wanted alone."""
        if self.stack is not None and isinstance(plan, NativePlan) and not plan.prefills:
            x_RD = self.stack.run(x_TD, plan, cache)
            return x_RD if self.config.pre_norm else self.layers[-1].get_submodule("ffn_norm")(x_RD)
        rows = None if len(plan.logit_rows) == len(x_TD) else plan.logit_rows
        if isinstance(plan, PagedPlan) and self.config.pre_norm:
            return fused.run(self.fused, x_TD, plan, cache, rows, self.config.activation)
        for layer in self.layers:
            x_TD = layer(x_TD, plan, cache, rows if layer is self.layers[-1] else None)
        return x_TD

    def logits(self, x_RE: Tensor, room: Tensor | None = None) -> Tensor | None:
        """Perhaps in `room`, earlier ones that nobody needs.

        Shapes: [R, E] -> [R, V] in fp32 on the driver; None on the other ranks.
        """
        logits: Tensor | None = self.embed.logits(x_RE, room)
        return logits
