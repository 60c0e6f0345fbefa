"""What a checkpoint's file holds beside the weights: metaseq's dict, of the first file or made for a model without one.

Knows that dict's keys. Does not know how weights are cut, or what of this is still true afterwards.

Source: metaseq's trainer.py (state_dict) and checkpoint_utils.py, which reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metaseq_api.checkpoint.inert import writable
from metaseq_api.checkpoint.part import Part, optimizer_state
from metaseq_api.checkpoint.rules import EMBED, OUTPUT, VERSION
from metaseq_api.checkpoint.unpickle import StoredTensor
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.checkpoint.write import Stream


class Source(Protocol):
    """A tensor whose numbers can be had in order: a LocalTensor, or one cut anew."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def flat(self, start: int, stop: int) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a file holds beside the weights and the optimizer's vectors."""

    path: Path
    """Where it comes from, for messages."""
    tree: Mapping[Any, Any]
    """As the file has it, "model" and "shard_metadata" included, which are made anew."""
    optimizer: Mapping[str, Any] | None = None
    """`last_optimizer_state`, or None where this file keeps none."""
    has_metadata: bool = False
    """Whether it had `shard_metadata`, which an unflattened file may have too."""
    buffers: Mapping[str, Source]
    shared: Mapping[str, str]
    """Parameters that are another one: by their name, the other's."""
    view: Callable[[StoredTensor], Tensor] | None = None
    """Maps a tensor of the tree."""

    def entry(self, index: int) -> dict[str, Any]:
        """What the optimizer keeps of a unit; empty where there is nothing."""
        state = (self.optimizer or {}).get("state")
        found = state.get(index) if isinstance(state, dict) else None
        return dict(found) if isinstance(found, dict) else {}

    def writable(self, name: str, value: Any, lost: list[str]) -> Any:
        """Make a value of the tree fit to be written; what cannot be is added to `lost`."""
        view = self.view
        assert view is not None or not isinstance(value, StoredTensor)
        plain, left_out = writable(value, lambda stored: Stream.of(view(stored)) if view else None)
        lost.extend(f"{name}.{inner}" for inner in left_out)
        return plain


def rest_of_part(part: Part) -> Rest:
    """Take what the first shard of a part says."""
    first = part.first
    return Rest(
        path=first.archive.path,
        tree=first.archive.tree,
        optimizer=optimizer_state(first),
        has_metadata=bool(first.units),
        buffers=part.buffers,
        shared=part.shared,
        view=first.archive.view,
    )


def rest_of_whole(checkpoint: WholeCheckpoint, num_units: int, kinds: Sequence[str]) -> Rest:
    """Say of a model from another family of files what metaseq's say of theirs.

    kinds: the optimizer's vectors that are kept. Its units are all in one group, the first of those it had: a unit
    holds parameters of them all.
    """
    config, state = checkpoint.config, checkpoint.optimizer if kinds else {}
    tied = config.tied_output
    optimizer: dict[str, Any] | None = None
    if kinds:
        group = {**next(iter(state.get("param_groups", [])), {}), "params": list(range(num_units))}
        entry = {"step": state.get("step")} | dict.fromkeys(kinds)
        optimizer = {"state": {i: dict(entry) for i in range(num_units)}, "param_groups": [group]}
    model = {
        "_name": "transformer_lm_megatron",
        "arch": "transformer_lm_megatron",
        "activation_fn": config.activation,
        "decoder_attention_heads": config.num_heads,
        "decoder_embed_dim": config.hidden_dim,
        "decoder_ffn_embed_dim": config.ffn_dim,
        "decoder_input_dim": config.embed_dim,
        "decoder_output_dim": config.embed_dim,
        "decoder_layers": config.num_layers,
        "decoder_learned_pos": True,
        "decoder_normalize_before": config.pre_norm,
        "disable_bias": not config.bias,
        "max_target_positions": config.max_positions,
        "share_decoder_input_output_embed": tied,
        "tokens_per_sample": config.max_positions,
    }
    cfg = {
        "common": {"model_parallel_size": 1, "fp16": config.dtype == "fp16", "bf16": config.dtype == "bf16"},
        "distributed_training": {"use_sharded_state": False},
        "model": model,
        "task": {"_name": "streaming_language_modeling"},
    }
    tree: dict[str, Any] = {
        "cfg": cfg,
        "model": None,
        "criterion": None,
        "optimizer_history": [{"num_updates": state.get("step") or 0}],
        "task_state": {},
        "extra_state": {},
    }
    return Rest(
        path=checkpoint.path,
        tree=tree | ({} if optimizer is None else {"last_optimizer_state": optimizer}),
        optimizer=optimizer,
        has_metadata=True,
        buffers={VERSION: _Version(checkpoint.tensor(EMBED).dtype)},
        shared={OUTPUT: EMBED} if tied else {},
    )


@dataclass(frozen=True, slots=True)
class _Version:
    """The mark of metaseq's layout of a decoder. Source: metaseq/models/transformer_decoder.py:76."""

    dtype: torch.dtype
    shape: tuple[int, ...] = (1,)
    numel: int = 1

    def flat(self, start: int, stop: int) -> Iterator[Tensor]:
        """Give the numbers start to stop."""
        yield torch.tensor([3.0], dtype=self.dtype)[start:stop]
