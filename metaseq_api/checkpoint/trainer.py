"""Writes what metaseq's trainer leaves: `checkpoint_last-model_part-J-shardK.pt`, by fairscale's own FSDP.

Makes the demo checkpoint and the tests' files, so that what is read elsewhere is what FSDP really writes. Knows
metaseq's parameter names, their order, and the dict around them. Does not know how any of it is read back: nothing of
the service imports this file, and it is the only one that needs fairscale.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from metaseq_api.core.config import POSITION_OFFSET, ModelConfig

INIT_STD = 0.02


class _Attention(nn.Module):
    """Causal self-attention; the rows of `qkv_proj` are keys, then values, then queries."""

    def __init__(self, config: ModelConfig, num_parts: int) -> None:
        super().__init__()
        width = config.hidden_dim // num_parts
        self.num_heads = config.num_heads // num_parts
        self.qkv_proj = nn.Linear(config.hidden_dim, 3 * width)
        self.out_proj = nn.Linear(width, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        key, value, query = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).flatten(2)))


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, num_parts: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, num_parts)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.hidden_dim, config.ffn_dim // num_parts)
        self.fc2 = nn.Linear(config.ffn_dim // num_parts, config.hidden_dim)
        self.final_layer_norm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + cast(Tensor, self.fc2(functional.relu(self.fc1(self.final_layer_norm(x)))))


class _Decoder(nn.Module):
    version: Tensor

    def __init__(self, config: ModelConfig, num_parts: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        vocab_size = config.vocab_size // num_parts
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_dim)
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, config.hidden_dim)
        self.layers = nn.ModuleList(wrap(_Layer(config, num_parts)) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.output_projection = nn.Linear(config.hidden_dim, vocab_size, bias=False)
        if config.tied_output:
            self.output_projection.weight = self.embed_tokens.weight


class FlatOPT(nn.Module):
    """One tensor-parallel part's parameters under metaseq's names, in its order of registration.

    Inside fairscale's `enable_wrap` every layer becomes an FSDP unit. `forward` is right for a whole model only, that
    is where num_parts is 1: there is no communication here.
    """

    def __init__(self, config: ModelConfig, num_parts: int = 1) -> None:
        from fairscale.nn.wrap import wrap

        super().__init__()
        config.check_parallel(num_parts)
        is_350m = not config.pre_norm or not config.final_norm or config.has_projection
        assert not is_350m, "350M was never trained under FSDP"
        self.decoder = _Decoder(config, num_parts, wrap)
        with torch.no_grad():
            for name, param in self.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    param.normal_(std=INIT_STD / math.sqrt(2 * config.num_layers))
                elif param.dim() > 1:
                    param.normal_(std=INIT_STD)
                elif name.endswith("bias"):
                    param.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position. Shapes: tokens [B, T] without padding -> [B, T, vocab]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device) + POSITION_OFFSET
        x = self.decoder.embed_tokens(tokens) + self.decoder.embed_positions(positions)
        for layer in self.decoder.layers:
            x = layer(x)
        return cast(Tensor, self.decoder.output_projection(self.decoder.layer_norm(x)))


class ProcessGroupStub:
    """Rank and size, all that fairscale asks of a process group until the first collective."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@contextlib.contextmanager
def _old_storage_api() -> Iterator[None]:
    """Fairscale still uses `Tensor.storage()`, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        yield


def fsdp_wrap(model: FlatOPT, rank: int, num_shards: int, *, wrap_layers: bool = True) -> nn.Module:
    """Wrap a loaded model as rank `rank` of `num_shards` would hold it: a unit per layer and one for the rest.

    wrap_layers: False makes one unit of it all, as small models are trained without activation checkpointing.

    The model is all fp16 or all fp32, as fairscale demands.
    """
    from fairscale.nn import FullyShardedDataParallel

    dtype = next(model.parameters()).dtype

    def unit(module: nn.Module) -> nn.Module:
        group = ProcessGroupStub(rank, num_shards)
        return cast(
            nn.Module,
            FullyShardedDataParallel(
                module,
                process_group=group,
                process_group_reduce_scatter=group,
                compute_device=torch.device("cpu"),
                compute_dtype=dtype,
            ),
        )

    with _old_storage_api():
        for index, layer in enumerate(model.decoder.layers if wrap_layers else ()):
            model.decoder.layers[index] = unit(layer)
        return unit(model)


def split_part(weights: Mapping[str, Tensor], part: int, num_parts: int) -> dict[str, Tensor]:
    """Take one part's share of a whole model under metaseq's fused names."""

    def share(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(num_parts, dim)[part]

    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if "qkv_proj" in name:
            out[name] = torch.cat([share(third, 0) for third in tensor.chunk(3)])
        elif any(word in name for word in ("embed_tokens", "output_projection", "fc1")):
            out[name] = share(tensor, 0)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            out[name] = share(tensor, 1)
        else:
            out[name] = tensor
    return out


def _cfg(config: ModelConfig, num_parts: int, num_shards: int) -> dict[str, Any]:
    model = Namespace(
        _name="transformer_lm_megatron",
        arch="transformer_lm_megatron",
        activation_fn=config.activation,
        decoder_layers=config.num_layers,
        decoder_embed_dim=config.hidden_dim,
        decoder_ffn_embed_dim=config.ffn_dim,
        decoder_attention_heads=config.num_heads,
        decoder_learned_pos=True,
        decoder_normalize_before=config.pre_norm,
        share_decoder_input_output_embed=config.tied_output,
        no_scale_embedding=True,
        dropout=0.1,
        max_target_positions=config.max_positions,
        tokens_per_sample=config.max_positions,
        model_parallel_size=num_parts,
        use_sharded_state=True,
    )
    common = {
        "seed": 1,
        "fp16": config.dtype == "fp16",
        "memory_efficient_fp16": config.dtype == "fp16",
        "bf16": config.dtype == "bf16",
        "model_parallel_size": num_parts,
    }
    return {
        "common": common,
        "distributed_training": {
            "ddp_backend": "fully_sharded",
            "distributed_world_size": num_parts * num_shards,
            "use_sharded_state": True,
        },
        "dataset": {"batch_size": 8},
        "optimization": {"max_update": 0, "lr": [1e-3], "clip_norm": 1.0},
        "checkpoint": {"save_dir": "checkpoints", "restore_file": "checkpoint_last.pt"},
        "model": model,
        "task": Namespace(_name="streaming_language_modeling", end_of_document_symbol="</s>"),
        "criterion": Namespace(_name="vocab_parallel_cross_entropy"),
        "optimizer": Namespace(_name="adam", adam_betas="(0.9, 0.95)", adam_eps=1e-8),
        "lr_scheduler": Namespace(_name="polynomial_decay", warmup_updates=0),
        "bpe": None,
        "tokenizer": None,
    }


def _extra_state(num_updates: int) -> dict[str, Any]:
    loss = {"val": np.float64(4.0), "sum": np.float64(4.0 * num_updates), "count": num_updates, "round": 3}
    return {
        "metrics": OrderedDict(train=[(10, "loss", "AverageMeter", loss), (90, "_wps", "TimeMeter", {"n": 0})]),
        "previous_training_time": 60.0,
        "ewm_loss": 4.0,
        "train_iterator": {
            "epoch": 1,
            "sequences_consumed": np.array([num_updates * 8]),
            "n": num_updates,
            "next_worker": 0,
        },
        "val_loss": None,
    }


def trainer_state(
    fsdp_model: nn.Module,
    config: ModelConfig,
    *,
    num_parts: int,
    optimizer_state: Mapping[str, Any] | None = None,
    num_updates: int = 1000,
) -> dict[str, Any]:
    """Make the dict that metaseq's trainer saves on this rank from what fairscale hands out.

    optimizer_state: an optimizer's own `state_dict()`; None leaves moments out, as Meta's public shards do.
    Source: metaseq/trainer.py:352-448.
    """
    fsdp = cast(Any, fsdp_model)
    with _old_storage_api():
        metadata, weights = fsdp.local_metadata_dict(), fsdp.local_state_dict()
    params = list(range(len(metadata["param_metadata"])))
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": params}
    optimizer = {"state": {}, "param_groups": [group]} if optimizer_state is None else dict(optimizer_state)
    return {
        "cfg": _cfg(config, num_parts, fsdp.world_size),
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "vocab_parallel_cross_entropy",
                "optimizer_name": "MemoryEfficientFP16Optimizer" if config.dtype == "fp16" else "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": num_updates,
            }
        ],
        "task_state": {},
        "extra_state": _extra_state(num_updates),
        "last_optimizer_state": optimizer | {"loss_scale": 128.0},
        "shard_metadata": metadata,
    }


def moments(fsdp_model: nn.Module, num_updates: int) -> dict[str, Any]:
    """Make an Adam state that can be told apart afterwards: exp_avg is the weight / 4, exp_avg_sq its square."""
    flat = [p.detach().float() for p in fsdp_model.parameters()]
    state = {i: {"step": num_updates, "exp_avg": p / 4, "exp_avg_sq": p.square()} for i, p in enumerate(flat)}
    return {"state": state, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": list(state)}]}


def write_trainer_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    num_parts: int,
    num_shards: int,
    dtype: torch.dtype = torch.float16,
    optimizer_state: bool = True,
    prefix: str = "checkpoint_last",
    num_updates: int = 1000,
    wrap_layers: bool = True,
) -> list[Path]:
    """Shard a whole model by fairscale's FSDP into `{prefix}-model_part-J-shardK.pt`; one process plays every rank.

    weights: the unsplit model under metaseq's fused names (`qkv_proj` rows: keys, values, queries); output_projection
    may be left out where it is tied. `optimizer_state` False leaves the moments out, as Meta's public shards do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in range(num_parts):
        share = split_part(weights, part, num_parts)
        if config.tied_output:
            share.setdefault("decoder.output_projection.weight", share["decoder.embed_tokens.weight"])
        for shard in range(num_shards):
            model = FlatOPT(config, num_parts)
            model.load_state_dict({"decoder.version": model.decoder.version, **share})
            fsdp = fsdp_wrap(
                model.half() if dtype == torch.float16 else model.float(), shard, num_shards, wrap_layers=wrap_layers
            )
            adam = moments(fsdp, num_updates) if optimizer_state else None
            state = trainer_state(fsdp, config, num_parts=num_parts, optimizer_state=adam, num_updates=num_updates)
            state["model"] = OrderedDict((name, tensor.to(dtype)) for name, tensor in state["model"].items())
            paths.append(folder / f"{prefix}-model_part-{part}-shard{shard}.pt")
            torch.save(state, paths[-1])
    return paths
