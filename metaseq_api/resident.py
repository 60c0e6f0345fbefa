"""An engine that lives in this process, without HTTP: a thread of its own loads the model and alone computes, and the
other ranks, where the model is split, are processes that end with it.

A thread rather than the caller's: whoever asks may be interrupted at any moment (Ctrl-C, a notebook's stop button) and
may come from any thread, while OpenMP wants one thread to do all the computing (see Engine).

Knows how a rank 0 without a service begins and ends. Does not know prompts; `llm` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from metaseq_api import host, rank
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.errors import EngineStopped, MetaseqApiError, RankFailed, SettingsError
from metaseq_api.launch.followers import Followers, meeting_place
from metaseq_api.launch.rendezvous import Placement
from metaseq_api.parallel.context import join, leave
from metaseq_api.parallel.roll import sign_in
from metaseq_api.settings import Settings

END_S = 20.0
"""Units: seconds that `close` waits for the thread; a step that runs is not cut short."""


class Resident:
    """Loads on creation, and returns when the model is loaded on every rank.

    `module` holds `run_rank` for the other ranks. Raises: MetaseqApiError.
    """

    def __init__(self, settings: Settings, *, module: str = host.__name__) -> None:
        num_ranks = _num_ranks(settings)
        self._settings = dataclasses.replace(settings, model_parallel=num_ranks)
        self._module = module
        self._engine: Engine | None = None
        self._followers: Followers | None = None
        self._error: Exception | None = None
        self._closed = False
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()
        try:
            self._loaded.wait()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._error is not None:
            raise self._error

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def engine(self) -> Engine:
        """Raises: EngineStopped after `close`; RankFailed where it failed."""
        if self._closed:
            raise EngineStopped("this model is closed; load it again to go on")
        if self._error is not None:
            raise self._error
        assert self._engine is not None
        return self._engine

    def why(self) -> MetaseqApiError | None:
        """Why the engine stopped answering, where it was not by `close`; known a moment after it did."""
        if self._engine is not None and self._engine.wait_failed(END_S):
            self._thread.join(END_S)
        return self._error if isinstance(self._error, MetaseqApiError) else None

    def close(self) -> None:
        """End the engine, its thread and the other ranks; who still waits gets EngineStopped. Harmless when closed."""
        if threading.current_thread() is self._thread:  # the garbage collector may call from anywhere
            threading.Thread(target=self.close, name="close").start()
            return
        self._closed = True
        if self._engine is None:  # still loading; the thread sees to it when it can
            if self._followers is not None:
                self._followers.end(0)
            return
        self._engine.stop()
        self._thread.join(END_S)

    def _live(self) -> None:
        """The thread's whole life."""
        try:
            with loaded(self._settings, self._keep, module=self._module) as (engine, _):
                self._engine = engine
                self._loaded.set()
                if not self._closed:
                    engine.run()
                if engine.wait_failed(0):
                    if self._followers is not None:
                        self._followers.blame()
                    raise RankFailed("the engine failed; its stack was logged")
        except Exception as e:  # the rim of this thread: whoever waits for it gets whatever it was
            self._error = e
        finally:
            self._loaded.set()

    def _keep(self, followers: Followers) -> None:
        self._followers = followers


@contextlib.contextmanager
def loaded(
    settings: Settings,
    begun: Callable[[Followers], object],
    *,
    module: str = host.__name__,
    open_weights: rank.Opener = open_checkpoint,
) -> Iterator[tuple[Engine, rank.Prepared]]:
    """An engine of `settings.model_parallel` ranks, to be run by this thread, whose rank 0 it is.

    `begun` hears of the other ranks before anything is read; `module` holds their `run_rank`. Raises: MetaseqApiError.
    """
    num_ranks = settings.model_parallel
    assert num_ranks
    store = meeting_place() if num_ranks > 1 else -1
    here = Placement(kind="alone", node=socket.gethostname())
    me, *others = here.local_ranks(num_ranks, f"file:///proc/self/fd/{store}")
    with contextlib.ExitStack() as stack:
        ready = rank.prepare(settings, me, open_weights)
        torch.set_num_threads(ready.threads)
        followers = Followers(settings, others, store, module=module)
        begun(followers)
        stack.callback(followers.end)
        try:
            with host.explained(me, ready.device):
                context = join(
                    rank=0,
                    world_size=num_ranks,
                    init=me.init,
                    device=ready.device,
                    timeout_s=settings.timeout_s,
                    node=me.node,
                    check=followers.check,
                )
                stack.callback(leave, context)
                sign_in(context, me.node, os.getpid())
                worker = rank.load(ready, context, settings)
                context.wait_for_all("loaded", timeout_s=host.LOAD_TIMEOUT_S, check=followers.check)
                engine = rank.make_engine(settings, ready, worker, Channel(context))
        except RankFailed:
            followers.blame()
            raise
        yield engine, ready


def _num_ranks(settings: Settings) -> int:
    """As told, else one per visible GPU, else 1. Raises: SettingsError."""
    num_ranks = settings.model_parallel
    if num_ranks is None:
        on_gpu = settings.device != "cpu" and not settings.demo and torch.cuda.is_available()
        num_ranks = torch.cuda.device_count() if on_gpu else 1
    if num_ranks > 1 and dist.is_initialized():
        raise SettingsError(
            f"model_parallel {num_ranks} needs torch.distributed, which this process uses already, for another model "
            "perhaps; close that first, or load this one in a process of its own"
        )
    return num_ranks
