"""One rank's life: check, meet the others, read its slice of the weights, then serve (rank 0) or follow.

The one library module that knows all the others: it puts them together and holds no logic of theirs. Started by
`launch.child` or, under srun and torchrun, by the door itself; `resident` puts the same together without the service.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from metaseq_api.engine.outlet import Outlet
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.worker import Worker, follow
from metaseq_api.errors import CheckpointMismatch, MemoryTooSmall, RankFailed, ResourceError, SettingsError
from metaseq_api.launch.child import ignore_stops, settle
from metaseq_api.launch.countdown import Countdown, Hooks
from metaseq_api.launch.drain import Drain
from metaseq_api.launch.front_end import FrontEnd
from metaseq_api.launch.meeting import resolved
from metaseq_api.launch.post_mortem import show_stack_and_kill, state_of
from metaseq_api.launch.recorder import Recorder, recorded
from metaseq_api.launch.rendezvous import RankInfo, device_index
from metaseq_api.launch.signals import heard
from metaseq_api.launch.startup import StartUp
from metaseq_api.launch.successor import hooks_of
from metaseq_api.launch.terms import Deadline, Terms
from metaseq_api.model.cache import KVCache
from metaseq_api.model.memory import Plan, plan
from metaseq_api.model.opt import OPT
from metaseq_api.parallel.context import ParallelContext, break_off, join, leave
from metaseq_api.parallel.roll import Peer, missing, sign_in
from metaseq_api.progress import progress_bar
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler
from metaseq_api.settings import Settings
from metaseq_api.tokenizer import Tokenizer, find_files

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0
Opener = Callable[[Path], Loadable]
_SPEAKS_OF_A_PEER = re.compile(r"timed? ?out|connect|peer|broken pipe|closed", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that was checked before anything large is read or any other rank is met."""

    checkpoint: Loadable
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    max_seq_len: int
    memory: Plan
    threads: int


def run_rank(
    settings: Settings,
    rank: RankInfo,
    sock: socket.socket | None,
    terms: Terms,
    open_weights: Opener = open_checkpoint,
) -> int:
    """Be one rank until the service ends; the exit code. `sock` is rank 0's listening socket.

    Raises: MetaseqApiError, with nothing left half-started.
    """
    startup = StartUp.of_this_process(supervised=rank.supervised)
    with recorded(settings, rank, sock) as recorder:
        ready = prepare(settings, rank, open_weights)
        startup.lap("checkpoint")
        with _front_end(settings, ready, sock) as front:
            return _be_rank(settings, ready, rank, front, terms, recorder, startup)


def _be_rank(
    settings: Settings,
    ready: Prepared,
    rank: RankInfo,
    front: FrontEnd | None,
    terms: Terms,
    recorder: Recorder,
    startup: StartUp,
) -> int:
    torch.set_num_threads(ready.threads)
    with resolved(rank.init, rank.rank, settings.interface) as (init, listen_fd):
        context = join(
            rank=rank.rank,
            world_size=rank.world_size,
            init=init,
            device=ready.device,
            timeout_s=settings.timeout_s,
            node=rank.node,
            listen_fd=listen_fd,
        )
    peers = sign_in(context, rank.node, os.getpid())
    startup.lap("meeting")
    with explained(rank, ready.device, context, peers):
        worker = load(ready, context, settings, recorder, startup)
        channel = Channel(context)
        if not context.is_driver:
            ignore_stops()
        context.wait_for_all("loaded", timeout_s=LOAD_TIMEOUT_S)
        startup.lap("other ranks")
        settle()
        if not context.is_driver:
            follow(worker, channel)
            code = 0
        else:
            assert front is not None
            code = serve(settings, ready, worker, channel, front, terms, recorder, startup)
    leave(context)
    return code


@contextlib.contextmanager
def explained(
    rank: RankInfo, device: torch.device, context: ParallelContext | None = None, peers: Sequence[Peer] = ()
) -> Iterator[None]:
    """Tell what torch raises in the words of `errors`; with a context, which rank was lost.

    Raises: MemoryTooSmall, RankFailed.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise MemoryTooSmall(
            f"rank {rank.rank} ran out of memory on {device} ({str(e).splitlines()[0]}); "
            "split the model further (--model-parallel), or take a smaller --max-batch-tokens"
        ) from e
    except RuntimeError as e:  # what torch.distributed raises where a peer is lost
        raise _explain(e, rank, context, list(peers)) from e


def prepare(settings: Settings, rank: RankInfo, open_weights: Opener = open_checkpoint) -> Prepared:
    """Check everything that can be checked cheaply. Raises: MetaseqApiError."""
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
    worker.prepare(settings.max_batch_size)
    startup.lap("steps")
    return worker


def serve(
    settings: Settings,
    ready: Prepared,
    worker: Worker,
    channel: Channel,
    front: FrontEnd,
    terms: Terms,
    recorder: Recorder,
    startup: StartUp,
    hooks: Hooks | None = None,
) -> int:
    """Rank 0: answer requests until told to end; the exit code.

    Raises: RankFailed, or the RuntimeError that says how, when the engine ended by itself.
    """
    engine = make_engine(settings, ready, worker, channel)
    cut_off = threading.Event()

    def lose_front() -> None:
        if not front.stopped:
            cut_off.set()
            front.kill()  # also where it lives: nothing it says is heard any more
            engine.end_by(time.monotonic())

    with heard() as signals:
        drain = Drain(engine, front, Deadline(terms), signals, recorder.draining)
        drain.start()
        front.serve()
        Outlet(engine, front.line, lose_front).start()
        recorder.ready()
        startup.lap("server")
        print_banner(settings, ready, worker, front, startup)
        countdown = Countdown(hooks or hooks_of(settings, terms.end_time), front.url, terms.end_time)
        countdown.start()
        engine.run()
        countdown.stop()
        signals.wake()
        drain.let_go()  # before what it listens to is closed
        if engine.failure is not None:
            threading.Thread(target=front.stop, args=(0,), daemon=True).start()  # while the others are asked for
            if isinstance(engine.failure, RuntimeError):
                raise engine.failure
            raise RankFailed("the engine failed; its stack is in the log above")
        if cut_off.is_set():
            raise RankFailed(front.ending())
        drain.join()
    return 0


def _front_end(
    settings: Settings, ready: Prepared, sock: socket.socket | None
) -> contextlib.AbstractContextManager[FrontEnd | None]:
    """Rank 0's: it gets ready to answer while the weights are read."""
    if sock is None:
        return contextlib.nullcontext(None)
    facts = {
        "model_name": _model_name(settings),
        "max_seq_len": ready.max_seq_len,
        "vocab_size": ready.config.vocab_size,
    }
    return FrontEnd(settings, sock, facts)


def _explain(error: RuntimeError, rank: RankInfo, context: ParallelContext | None, peers: list[Peer]) -> RankFailed:
    """Which rank was lost, where that is why this one cannot go on; its stack, and this one's, are in the log then."""
    reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
    reason = re.sub(r"^\[[^]]*\] ", "", reason)  # the line of gloo's source
    if context is None or context.tensor_size == 1 or not _SPEAKS_OF_A_PEER.search(str(error)):
        return RankFailed(f"rank {rank.rank} cannot go on without the others, or failed: {reason}")
    ignore_stops()  # what follows takes seconds, within which torchrun or srun may end whoever is left
    faulthandler.dump_traceback(all_threads=False)
    break_off(context)
    lost = missing(context, peers)
    if not lost:
        return RankFailed(f"rank {rank.rank} was cut off, though every rank is there: {reason}")
    log.error("lost %s: %s", ", ".join(map(str, lost)), reason)
    here = [p for p in lost if p.node == rank.node]
    look = state_of if rank.supervised else show_stack_and_kill
    states = {p: f"it was {look(p.pid)}" for p in here}
    says = "; ".join(f"lost {p}: {states.get(p, 'it does not answer, and cannot show its stack')}" for p in lost)
    return RankFailed(f"{says} ({reason})")


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


def print_banner(settings: Settings, ready: Prepared, worker: Worker, front: FrontEnd, startup: StartUp) -> None:
    """Say what is served, how long that took, where it is, and what to type."""
    from metaseq_api.server.keys import curl_header

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
    log.info("ready after %s", startup.told())
    log.info("ready on %s/ ; try:\n%s", front.url, curl_line(front.url, prompt, curl_header(settings)))


def curl_line(url: str, prompt: str, header: str = "") -> str:
    """A request to paste into a shell."""
    return (
        f"curl {url}/v1/completions -H 'Content-Type: application/json'{header} "
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
        raise ResourceError(
            "--device cuda, but torch sees no GPU here: it must be a torch built for CUDA, and `nvidia-smi` must show "
            "the GPU; --device cpu serves without"
        )
    index = device_index(rank.local_rank, available)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
