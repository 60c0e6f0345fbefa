"""One rank that shards tiny OPTs with torch's `fully_shard` and saves each: fsdp2_rank.py FOLDER RANK SIZE."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.hf_opt import tiny_opt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

VARIANTS = ("pre-norm", "350m")
WINDOW = 63
"""An odd number of positions: shards of different sizes."""


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    for variant in VARIANTS:
        model = tiny_opt(variant, window=WINDOW)
        for layer in model.model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        model(torch.tensor([[2, 5, 6]])).logits.sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
        dcp.save(state, checkpoint_id=folder / variant)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
