"""One rank of a tensor-parallel forward pass: python rank_logits.py RANK SIZE STORE OUT NODE SHARES.

Beside OUT lie the models, as `save` leaves them: importing Hugging Face takes each rank seconds. Rank 0 saves its
logits. SHARES: whether the ranks are to share memory, True or False.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from support.steps import Driver

from metaseq_api.core import Batch, BatchItem, ModelConfig
from metaseq_api.kernels import reference
from metaseq_api.model.decode_step import DecodeSteps
from metaseq_api.model.weights import TensorWeights
from metaseq_api.parallel.context import join, leave

CASES = (
    ("pre-norm", torch.float32),
    ("350m", torch.float32),
    ("pre-norm", torch.bfloat16),
    ("pre-norm", torch.float16),  # whose weights lie on a CPU as on a GPU
)
MODELS = "models.pt"
PROMPT = [2, *range(10, 40)]


def run(driver: Driver) -> torch.Tensor:
    """A prefill, a chunk, and a decoding step beside a second prompt."""
    blocks, others = [3, 1, 0, 6], [9, 8]
    got = driver.step((PROMPT[:20], 0, blocks))
    got += driver.step((PROMPT[:29], 20, blocks))
    got += driver.step((PROMPT[:30], 29, blocks), (PROMPT[:9], 0, others))
    got += driver.step((PROMPT, 30, blocks), (PROMPT[:10], 9, others))
    return torch.cat(got) if got else torch.empty(0)


def run_fixed(driver: Driver) -> torch.Tensor:
    """Two sequences of single tokens as a GPU takes them, from buffers that always lie in the same memory."""
    steps = DecodeSteps(driver.model, driver.cache, reference.PLAIN, capture=False)
    singles = [
        tuple(
            BatchItem(start=at, token_ids=(token,), block_ids=blocks[: at // 8 + 1], num_logits=1, num_prompt=0)
            for token, blocks in ((PROMPT[at], (13, 11)), (PROMPT[-1 - at], (12, 10)))
        )
        for at in range(12)
    ]
    # three rows of a size of four: one more sequence of one token
    singles[-1] += (BatchItem(start=0, token_ids=(7,), block_ids=(15,), num_logits=1, num_prompt=0),)
    alone = BatchItem(start=12, token_ids=(PROMPT[12],), block_ids=(13, 11), num_logits=1, num_prompt=0)
    got = [steps.run(Batch(items=items)) for items in (*singles, (alone,))]
    return torch.cat([logits.clone() for logits in got if logits is not None] or [torch.empty(0)])


def save(folder: Path, models: list[tuple[ModelConfig, dict[str, torch.Tensor]]]) -> None:
    """One for each of CASES."""
    torch.save([(dataclasses.asdict(config), weights) for config, weights in models], folder / MODELS)


def main() -> None:
    rank, size, store, out, node, shares = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    context = join(rank=rank, world_size=size, init=f"file://{store}", device=cpu, timeout_s=60, node=node)
    assert str(context.memory is not None) == shares
    assert context.least(100 - rank) == 101 - size
    models, found = torch.load(Path(out).with_name(MODELS)), []
    for (config, weights), (_, dtype) in zip(models, CASES, strict=True):
        driver = Driver(ModelConfig(**config), TensorWeights(weights), context=context, dtype=dtype)
        found.append((run(driver), run_fixed(driver)))
    context.wait_for_all("done", timeout_s=60)
    if rank == 0:
        torch.save(found, out)
    leave(context)
    sys.stdout.flush()
    os._exit(0)  # as a service's ranks end: a library's teardown may abort


if __name__ == "__main__":
    main()
