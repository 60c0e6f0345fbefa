"""A checkpoint of very many shards, cut by fairscale's FSDP without a wrapped model of its own for each.

Real: fairscale flattens and names every unit, makes the metadata, and cuts each slice (its own `_get_shard`, told that
it is rank K of D); torch.save writes the files. Not real: no process group, no training, and one wrapped model a part
plays all D ranks. `write_trainer_checkpoint`, which wraps one for every rank, gives the same files: a test says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from metaseq_api.checkpoint.trainer import FlatOPT, fsdp_wrap, split_part, trainer_state
from metaseq_api.core.config import ModelConfig


def write_many_shards(
    folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, *, num_parts: int, num_shards: int
) -> list[Path]:
    """Write `checkpoint_last-model_part-J-shardK.pt` in fp16, without moments as Meta's public shards are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in range(num_parts):
        share = split_part(weights, part, num_parts)
        share["decoder.output_projection.weight"] = share["decoder.embed_tokens.weight"]
        model = FlatOPT(config, num_parts)
        model.load_state_dict({"decoder.version": model.decoder.version, **share})
        fsdp = cast(Any, fsdp_wrap(model.half(), 0, 1))
        state = trainer_state(fsdp, config, num_parts=num_parts)
        state["cfg"]["distributed_training"]["distributed_world_size"] = num_parts * num_shards
        whole = state["model"]
        fsdp.world_size = num_shards
        for shard in range(num_shards):
            fsdp.rank = shard
            state["model"] = OrderedDict(whole)
            for entry in state["shard_metadata"]["param_metadata"]:
                key = ".".join(filter(None, (entry["fsdp_path"], "flat_param_0")))
                state["model"][key], entry["params"]["flat_param_0"]["padding"] = fsdp._get_shard(whole[key])
            paths.append(folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt")
            torch.save(state, paths[-1])
    return paths
