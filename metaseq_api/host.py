"""One rank's life: check, meet the others, read its slice of the weights, then serve (rank 0) or follow.

The one library module that knows all the others: it puts them together and holds no logic of theirs. Started by
`launch.child` or, under srun and torchrun, by the door itself; `resident` puts the same together without the service.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from metaseq_api.checkpoint.checkpoint import DTYPES, Checkpoint
from metaseq_api.checkpoint.counted import Counted, driver_bytes
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.verify import glance
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.core import ModelConfig
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.worker import Worker, follow
from metaseq_api.errors import CheckpointMismatch, MemoryTooSmall, RankFailed, SettingsError
from metaseq_api.launch.rendezvous import RankInfo, device_index
from metaseq_api.model.cache import KVCache
from metaseq_api.model.memory import Plan, plan
from metaseq_api.model.opt import OPT
from metaseq_api.parallel.context import ParallelContext, join, leave
from metaseq_api.progress import progress_bar
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler
from metaseq_api.settings import Settings
from metaseq_api.tokenizer import Tokenizer, find_files

log = logging.getLogger(__name__)

GRACE_S = 2.0
"""Units: seconds that running requests have once the service is told to end."""
LOAD_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that was checked before anything large is read or any other rank is met."""

    checkpoint: Checkpoint | WholeCheckpoint
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    max_seq_len: int
    memory: Plan
    threads: int


def run_rank(settings: Settings, rank: RankInfo, sock: socket.socket | None) -> int:
    """Be one rank until the service ends; the exit code. `sock` is rank 0's listening socket.

    Raises: MetaseqApiError, with nothing left half-started.
    """
    ready = prepare(settings, rank)
    torch.set_num_threads(ready.threads)
    context = join(
        rank=rank.rank,
        world_size=rank.world_size,
        init=rank.init,
        device=ready.device,
        timeout_s=settings.timeout_s,
    )
    with explained(rank, ready.device):
        worker = load(ready, context, settings)
        channel = Channel(context)
        context.wait_for_all("loaded", timeout_s=LOAD_TIMEOUT_S)
        if not context.is_driver:
            follow(worker, channel)
            code = 0
        else:
            assert sock is not None
            code = serve(settings, ready, worker, channel, sock)
    leave(context)
    return code


@contextlib.contextmanager
def explained(rank: RankInfo, device: torch.device) -> Iterator[None]:
    """Tell what torch raises in the words of `errors`. Raises: MemoryTooSmall, RankFailed."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise MemoryTooSmall(
            f"rank {rank.rank} ran out of memory on {device} ({str(e).splitlines()[0]}); "
            "split the model further (--model-parallel), or take a smaller --max-batch-tokens"
        ) from e
    except RuntimeError as e:  # what torch.distributed raises where a peer is lost
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise RankFailed(f"rank {rank.rank} cannot go on without the others, or failed: {reason}") from e


def prepare(settings: Settings, rank: RankInfo) -> Prepared:
    """Check everything that can be checked cheaply. Raises: MetaseqApiError."""
    checkpoint = open_checkpoint(settings.checkpoint)
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
    return Prepared(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
        threads=settings.threads or max(1, torch.get_num_threads() // rank.local_world_size),
        memory=plan(
            config,
            settings,
            dtype=dtype,
            device=device,
            tensor_size=rank.world_size,
            ranks_here=rank.local_world_size,
            max_seq_len=max_seq_len,
        ),
    )


def load(ready: Prepared, context: ParallelContext, settings: Settings) -> Worker:
    """Read this rank's slice of the weights, rank 0 saying how far it itself is, and make its cache."""
    num_blocks = context.least(ready.memory.num_blocks)  # now: after reading, ranks may be minutes apart
    model = OPT(ready.config, context, ready.dtype)
    with progress_bar("loading") if context.is_driver else contextlib.nullcontext(None) as begin:
        if begin is None:
            model.load(ready.checkpoint)
        else:
            model.load(Counted(ready.checkpoint, begin(driver_bytes(ready.checkpoint, context.tensor_size))))
    cache = KVCache(ready.config, context, ready.dtype, num_blocks=num_blocks, block_size=settings.block_size)
    worker = Worker(model, cache, graphs=settings.cuda_graphs)
    worker.prepare(settings.max_batch_size)
    return worker


def serve(settings: Settings, ready: Prepared, worker: Worker, channel: Channel, sock: socket.socket) -> int:
    """Rank 0: answer requests until told to end; the exit code. Raises: RankFailed when the engine ended by itself."""
    # only rank 0 needs these: a follower, and a machine without flask, never import them
    from metaseq_api.server.app import create_app
    from metaseq_api.server.run import Server

    engine = make_engine(settings, ready, worker, channel)
    server = Server(create_app(engine, settings), sock)

    def end() -> None:
        log.info("ending: running requests have %.0f s", GRACE_S)
        stopper = threading.Thread(target=server.stop, args=(GRACE_S,))
        stopper.start()
        engine.stop(GRACE_S)
        stopper.join()

    ending = threading.Thread(target=end, name="end")
    # a thread, since a handler must not wait for what the thread it interrupts may hold
    signal.signal(signal.SIGTERM, lambda *_: ending.start() if ending.ident is None else None)
    server.start()
    print_banner(settings, ready, worker, sock)
    engine.run()
    if engine.wait_failed(0):
        server.stop(0)
        raise RankFailed("the engine failed; its stack is in the log above")
    ending.join()
    return 0


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
        model_name=_model_name(settings),
        heartbeat_s=settings.timeout_s / 3,
        results=ResultCache(settings.cache_size, settings.cache_list_size) if settings.cache_size else None,
    )


def print_banner(settings: Settings, ready: Prepared, worker: Worker, sock: socket.socket) -> None:
    """Say what is served, where, and what to type."""
    from metaseq_api.server.keys import curl_header

    host, port = sock.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    config, context, cache = ready.config, worker.model.context, worker.cache
    source = ready.checkpoint
    prompt = "Return the" if ready.tokenizer.vocab_size < 10000 else "Paris is the capital of France and"
    log.info(
        "serving %s (%s) from %d part(s) x %d shard(s), %.1f M parameters, %s on %d %s rank(s), cache %d tokens",
        _model_name(settings),
        "the embedded demo model" if settings.demo else settings.checkpoint,
        source.num_parts,
        source.num_shards,
        config.num_params / 1e6,
        str(ready.dtype).removeprefix("torch."),
        context.tensor_size,
        ready.device.type,
        cache.num_blocks * cache.block_size,
    )
    log.info("ready on http://%s:%d/ ; try:\n%s", shown, port, curl_line(shown, port, prompt, curl_header(settings)))


def curl_line(host: str, port: int, prompt: str, header: str = "") -> str:
    """A request to paste into a shell."""
    return (
        f"curl http://{host}:{port}/v1/completions -H 'Content-Type: application/json'{header} "
        f'-d \'{{"prompt": "{prompt}", "max_tokens": 32, "temperature": 0}}\''
    )


def _model_name(settings: Settings) -> str:
    """What clients see: the folder's name, never its path."""
    return "demo" if settings.demo else Path(settings.checkpoint).resolve().name


def _device(settings: Settings, rank: RankInfo) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device is None and not available):
        return torch.device("cpu")
    if not available:
        raise SettingsError("--device cuda, but this machine shows no GPU; leave --device out to serve on the CPU")
    index = device_index(rank.local_rank, available)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
