"""One rank's life: check, meet the others, read its slice of the weights, then serve (rank 0) or follow.

`rank` puts together what it is made of. This module knows all the others, and holds no logic of theirs. Started by
`launch.child` or, under srun and torchrun, by the door itself; `resident` runs the same without the service.
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
from collections.abc import Iterator, Sequence

import torch

from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.outlet import Outlet
from metaseq_api.engine.worker import Worker, follow
from metaseq_api.errors import MemoryTooSmall, RankFailed
from metaseq_api.launch.child import ignore_stops, settle
from metaseq_api.launch.countdown import Countdown, Hooks
from metaseq_api.launch.drain import Drain
from metaseq_api.launch.front_end import FrontEnd
from metaseq_api.launch.meeting import resolved
from metaseq_api.launch.post_mortem import show_stack_and_kill, state_of
from metaseq_api.launch.recorder import Recorder, recorded
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.signals import heard
from metaseq_api.launch.startup import StartUp
from metaseq_api.launch.successor import hooks_of
from metaseq_api.launch.terms import Deadline, Terms
from metaseq_api.parallel.context import ParallelContext, break_off, join, leave
from metaseq_api.parallel.roll import Peer, missing, sign_in
from metaseq_api.rank import Opener, Prepared, load, make_engine, model_name, prepare
from metaseq_api.settings import Settings

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0
_SPEAKS_OF_A_PEER = re.compile(r"timed? ?out|connect|peer|broken pipe|closed", re.IGNORECASE)


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
        ready = prepare(settings, rank, open_weights, startup)
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
        "model_name": model_name(settings),
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


def print_banner(settings: Settings, ready: Prepared, worker: Worker, front: FrontEnd, startup: StartUp) -> None:
    """Say what is served, how long that took, where it is, and what to type."""
    from metaseq_api.server.keys import curl_header

    config, context, cache = ready.config, worker.model.context, worker.cache
    source = ready.checkpoint
    prompt = "Return the" if ready.tokenizer.vocab_size < 10000 else "Paris is the capital of France and"
    log.info(
        "serving %s (%s) from %d part(s) x %d shard(s), %.1f M parameters, %s on %d %s rank(s), cache %d tokens",
        model_name(settings),
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
