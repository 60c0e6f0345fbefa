"""What one rank is made of: what is checked first, its slice of the weights, its cache, and rank 0's engine.

Puts together what other modules know, and holds no logic of theirs. Does not know processes or HTTP; who runs what is
made here is `host` for a service, `resident` for a caller's own process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from metaseq_api.checkpoint.checkpoint import DTYPES, Checkpoint
from metaseq_api.checkpoint.counted import Counted, Loadable, driver_bytes
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.verify import glance
from metaseq_api.core import ModelConfig
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.worker import Worker
from metaseq_api.errors import CheckpointMismatch, ResourceError, SettingsError
from metaseq_api.launch.recorder import Recorder
from metaseq_api.launch.rendezvous import RankInfo, device_index
from metaseq_api.launch.startup import StartUp
from metaseq_api.model.cache import KVCache
from metaseq_api.model.memory import Plan, plan
from metaseq_api.model.opt import OPT
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.parallel.layers import kept_in
from metaseq_api.progress import progress_bar
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler
from metaseq_api.settings import Settings
from metaseq_api.tokenizer import Tokenizer, find_files

log = logging.getLogger(__name__)

Opener = Callable[[Path], Loadable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that was checked before anything large is read or any other rank is met."""

    checkpoint: Loadable
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    kept: torch.dtype  # what linear layers keep their weights in
    max_seq_len: int
    memory: Plan
    threads: int


def prepare(
    settings: Settings, rank: RankInfo, open_weights: Opener = open_checkpoint, startup: StartUp | None = None
) -> Prepared:
    """Check everything that can be checked cheaply. Raises: MetaseqApiError."""
    startup = startup or StartUp.of_this_process(supervised=False)
    checkpoint = open_weights(settings.checkpoint)
    config = checkpoint.config
    config.check_parallel(rank.world_size)
    max_seq_len = settings.max_seq_len or config.max_positions
    if max_seq_len > config.max_positions:
        raise SettingsError(
            f"MAX_SEQ_LEN (--max-seq-len) is {max_seq_len}, but this model has {config.max_positions} positions; "
            "lower it"
        )
    if rank.rank == 0 and isinstance(checkpoint, Checkpoint):
        for finding in glance(checkpoint):
            if finding.fatal:
                raise CheckpointMismatch(f"{finding.path} {finding.what}")
            log.warning("%s: %s", finding.path, finding.what)
    tokenizer = Tokenizer.load(
        *find_files(settings.checkpoint, settings.bpe_vocab, settings.bpe_merges), model_vocab_size=config.vocab_size
    )
    device = _device(settings, rank)
    dtype = DTYPES[settings.dtype or (config.dtype if device.type == "cuda" else "fp32")]
    with startup.inside("compiling", around="checkpoint"):  # kernels for this CPU, where nobody has before
        kept = kept_in(DTYPES[config.dtype], dtype, device)
    memory = plan(
        config,
        settings,
        dtype=dtype,
        kept=kept,
        device=device,
        tensor_size=rank.world_size,
        ranks_here=rank.local_world_size,
        max_seq_len=max_seq_len,
    )
    startup.lap("checkpoint")
    return Prepared(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        kept=kept,
        max_seq_len=max_seq_len,
        threads=settings.threads or max(1, torch.get_num_threads() // rank.local_world_size),
        memory=memory,
    )


def load(
    ready: Prepared,
    context: ParallelContext,
    settings: Settings,
    recorder: Recorder | None = None,
    startup: StartUp | None = None,
) -> Worker:
    """Read this rank's slice of the weights, rank 0 saying how far it itself is, and make its cache."""
    startup = startup or StartUp.of_this_process(supervised=False)
    num_blocks = context.least(ready.memory.num_blocks)  # now: after reading, ranks may be minutes apart
    model = OPT(ready.config, context, ready.dtype)
    with progress_bar("loading") if context.is_driver else contextlib.nullcontext(None) as begin:
        if begin is None:
            model.load(ready.checkpoint)
        else:
            total = driver_bytes(ready.checkpoint, context.tensor_size)
            listeners = [begin(total), *([recorder.loading(total)] if recorder else [])]
            model.load(
                Counted(
                    ready.checkpoint,
                    lambda done: [told(done) for told in listeners],
                    lambda: startup.inside("reading", around="packing"),
                )
            )
    startup.lap("packing")
    cache = KVCache(ready.config, context, ready.dtype, num_blocks=num_blocks, block_size=settings.block_size)
    ahead = settings.run_ahead if settings.run_ahead is not None else ready.device.type == "cuda"
    worker = Worker(model, cache, graphs=settings.cuda_graphs, max_ahead=settings.max_batch_size if ahead else 0)
    startup.lap("cache")
    worker.prepare(settings.max_batch_size, first=True)  # the rest when there is nothing else to do
    startup.lap("steps")
    return worker


def make_engine(settings: Settings, ready: Prepared, worker: Worker, channel: Channel) -> Engine:
    """Rank 0's engine, not yet running."""
    cache = worker.cache
    return Engine(
        worker=worker,
        channel=channel,
        scheduler=Scheduler(
            BlockPool(cache.num_blocks, cache.block_size),
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_size=settings.max_batch_size,
            prefix_cache=settings.prefix_cache,
        ),
        tokenizer=ready.tokenizer,
        limits=Limits(max_seq_len=ready.max_seq_len, max_samples=settings.max_beam, max_queue=settings.max_queue),
        model_name=model_name(settings),
        heartbeat_s=settings.timeout_s / 3,
        results=ResultCache(settings.cache_size, settings.cache_list_size) if settings.cache_size else None,
    )


def model_name(settings: Settings) -> str:
    """What clients see: the folder's name, never its path."""
    return "demo" if settings.demo else Path(settings.checkpoint).resolve().name


def _device(settings: Settings, rank: RankInfo) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device is None and not available):
        return torch.device("cpu")
    if not available:
        raise ResourceError(
            "--device cuda, but torch sees no GPU here: it must be a torch built for CUDA, and `nvidia-smi` must show "
            "the GPU; --device cpu serves without"
        )
    index = device_index(rank.local_rank, available)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
