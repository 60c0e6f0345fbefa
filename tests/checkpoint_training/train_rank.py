"""One rank of a small real training under fairscale's FSDP: `train_rank.py FOLDER RANK SIZE`, with tests/ on the path.

Every rank saves its shard as metaseq's trainer does; rank 0 also saves what FSDP itself says the whole model is.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn import FullyShardedDataParallel, enable_wrap, wrap
from support import fairscale_cpu
from torch.nn import functional

from metaseq_api.checkpoint.trainer import FlatOPT, trainer_state
from metaseq_api.core.config import ModelConfig

# odd sizes, so that flat parameters do not divide by the ranks and padding is written
CONFIG = ModelConfig(
    num_layers=2, hidden_dim=18, num_heads=2, ffn_dim=37, vocab_size=97, max_positions=16, dtype="fp32"
)
STEPS = 4
BATCH_SIZE = 4
# a large eps: the gradient of a key's bias is rounding alone, which Adam would blow up to whole steps
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-4}


def batch() -> torch.Tensor:
    """The whole batch, the same at every step. Shapes: [B, T + 1]."""
    return torch.randint(4, CONFIG.vocab_size, (BATCH_SIZE, 13), generator=torch.Generator().manual_seed(5))


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    fairscale_cpu.install()
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    # gloo cannot reduce-scatter fairscale's two-dimensional buckets
    with enable_wrap(wrapper_cls=FullyShardedDataParallel, compute_device=cpu, bucket_cap_mb=0):
        model = wrap(FlatOPT(CONFIG))
    initial = model.state_dict()
    optimizer = torch.optim.Adam(model.parameters(), **ADAM)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, batch()[rank::size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = trainer_state(model, CONFIG, num_parts=1, optimizer_state=optimizer.state_dict(), num_updates=STEPS)
    torch.save(state, folder / f"checkpoint_last-model_part-0-shard{rank}.pt")
    final = model.state_dict()
    if rank == 0:
        torch.save({"initial": initial, "final": final, "losses": losses}, folder / "told.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
