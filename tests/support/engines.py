"""A whole engine around a tiny Hugging Face OPT with random weights, in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from support.hf_opt import config_of, metaseq_weights, tiny_opt
from support.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer
from support.uncaptured import uncaptured
from torch import Tensor
from transformers import OPTForCausalLM

from metaseq_api.core import Batch, Completion, Request, SamplingParams
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.worker import Worker
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT
from metaseq_api.model.weights import TensorWeights
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler

WINDOW = 96


def tiny_model() -> OPTForCausalLM:
    return tiny_opt("pre-norm", window=WINDOW, vocab_size=VOCAB_SIZE)


@contextmanager
def running_engine(
    folder: Path,
    *,
    num_blocks: int = 64,
    block_size: int = 8,
    max_batch_tokens: int = 64,
    max_batch_size: int = 32,
    max_queue: int = 1000,
    context: ParallelContext | None = None,
    fails: bool = False,
    dtype: torch.dtype = torch.float32,
    prefix_cache: bool = True,
    results: ResultCache | None = None,
    ahead: bool = False,
    prepares: bool = False,
) -> Iterator[Engine]:
    """Start an engine, which with `ahead` starts its steps as on a GPU, and with `prepares` takes them as one does.

    At the end prove that it is idle, whole, and leaked no block.
    """
    hf = tiny_model()
    config, context = config_of(hf), context or ParallelContext()
    model = OPT(config, context, dtype)
    model.load(TensorWeights(metaseq_weights(hf)))
    cache = KVCache(config, context, dtype, num_blocks=num_blocks, block_size=block_size)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size),
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        prefix_cache=prefix_cache,
    )
    worker = Worker(model, cache, max_ahead=max_batch_size if ahead else 0)
    if prepares:
        uncaptured(worker).prepare(max_batch_size, first=True)
    engine = engine_of(worker, scheduler, folder, max_queue=max_queue, results=results)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(grace_s=20)
    assert engine.wait_failed(0) is fails
    assert scheduler.num_running == scheduler.num_waiting == 0
    scheduler.pool.check_idle()
    assert not engine._book
    assert not engine._book._live
    assert not engine._book._leaders
    assert not engine._admission.num_inside


def slow_down(engine: Engine) -> None:
    """Each of its steps takes 5 ms at least, so that what should happen while it works does, on any machine."""
    run = engine._worker.run

    def slowly(batch: Batch) -> Iterator[Tensor | None]:
        time.sleep(0.005)
        return run(batch)

    engine._worker.run = slowly  # type: ignore[method-assign]


def engine_of(
    worker: Worker, scheduler: Scheduler, folder: Path, *, max_queue: int = 1000, results: ResultCache | None = None
) -> Engine:
    """An engine that is not yet running, with a tokenizer whose files are put into `folder`."""
    return Engine(
        worker=worker,
        channel=Channel(worker.model.context),
        scheduler=scheduler,
        tokenizer=tiny_tokenizer(folder),
        limits=Limits(max_seq_len=WINDOW, max_samples=8, max_queue=max_queue),
        model_name="tiny",
        heartbeat_s=0.05,
        results=results,
    )


def ask(engine: Engine, *prompts: list[int] | str, **params: object) -> list[Completion]:
    """Submit and wait."""
    ids = tuple(tuple(engine.encode(p)) if isinstance(p, str) else tuple(p) for p in prompts)
    request = Request(request_id="test", prompts=ids, params=SamplingParams(**params))  # type: ignore[arg-type]
    return engine.submit(request).result(30)
