"""One rank that shards tiny OPTs with torch's `fully_shard` and saves each: fsdp2_rank.py FOLDER RANK SIZE.

FOLDER/VARIANT is a plain optimizer's state beside the model, VARIANT-named and VARIANT-flattened are get_state_dict's;
VARIANT.pt holds the optimizer's own tensors, whole, by the model's names for its parameters.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.checkpoints import TINY
from support.hf_opt import tiny_opt
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from metaseq_api.checkpoint.trainer import FlatOPT

VARIANTS = ("pre-norm", "350m", "fused")
WINDOW = 63
"""An odd number of positions: shards of different sizes."""


def made(variant: str) -> tuple[nn.Module, nn.ModuleList]:
    """A model, and those of its layers that are units."""
    if variant == "fused":
        torch.manual_seed(0)
        flat = FlatOPT(TINY)
        return flat, flat.decoder.layers
    model = tiny_opt(variant, window=WINDOW)
    return model, model.model.decoder.layers


def train(model: nn.Module) -> torch.optim.Optimizer:
    """Two steps that leave the weights as they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    for token in (5, 6):
        out = model(torch.tensor([[2, token, 7]]))
        (out if isinstance(out, Tensor) else out.logits).square().sum().backward()
        optimizer.step()
    return optimizer


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    for variant in VARIANTS:
        model, layers = made(variant)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = train(model)
        moments = {
            name: {kind: optimizer.state[p][kind].full_tensor() for kind in ("exp_avg", "exp_avg_sq")}
            for name, p in model.named_parameters()
        }
        if rank == 0:
            torch.save(moments, folder / f"{variant}.pt")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
        dcp.save(state, checkpoint_id=folder / variant)
        for kind in ("named", "flattened"):
            options = StateDictOptions(flatten_optimizer_state_dict=kind == "flattened")
            weights, optim = get_state_dict(model, optimizer, options=options)
            dcp.save({"app": {"model": weights, "optim": optim}}, checkpoint_id=folder / f"{variant}-{kind}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
