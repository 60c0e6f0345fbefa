"""One of two ranks that make their decode steps while they serve: python rank_prepares.py RANK STORE FOLDER.

FOLDER holds model.pt, [ModelConfig as a dict, weights]. Each rank writes which sizes it made, in order, to
made-RANK.json; rank 0 writes its answers too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from support.engines import ask, engine_of
from support.processes import until
from support.uncaptured import made, uncaptured

from metaseq_api.core import ModelConfig
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.worker import Worker, follow
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT
from metaseq_api.model.weights import TensorWeights
from metaseq_api.parallel.context import join, leave
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler

PROMPTS = [[5, 6, 7], [9, 8], [4, 4, 4, 4]]


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    context = join(rank=rank, world_size=2, init=f"file://{store}", device=torch.device("cpu"), timeout_s=60)
    config, weights = torch.load(folder / "model.pt")
    model = OPT(ModelConfig(**config), context, torch.float32)
    model.load(TensorWeights(weights))
    cache = KVCache(model.config, context, torch.float32, num_blocks=64, block_size=8)
    worker = uncaptured(Worker(model, cache, max_ahead=8))
    worker.prepare(8, first=True)
    if rank:
        follow(worker, Channel(context))
    else:
        scheduler = Scheduler(BlockPool(64, 8), max_batch_tokens=64, max_batch_size=8)
        engine = engine_of(worker, scheduler, folder)
        kept, Worker.unprepared = Worker.unprepared, False  # type: ignore[method-assign, assignment]  # never idle
        engine.start()
        found = [list(c.token_ids) for c in ask(engine, *PROMPTS, max_tokens=6, temperature=0, ignore_eos=True)]
        Worker.unprepared = kept  # type: ignore[method-assign]
        until(lambda: not worker.unprepared, "all to be made")
        engine.stop()
        (folder / "answers.json").write_text(json.dumps(found))
    (folder / f"made-{rank}.json").write_text(json.dumps(made(worker)))
    leave(context)
    sys.stdout.flush()
    os._exit(0)  # as a service's ranks end: a library's teardown may abort


if __name__ == "__main__":
    main()
