"""What is measured: random weights of a published shape or a real checkpoint, for our engine and for Hugging Face's.

Random weights are made on the device when they are read, in the dtype in which the shape's were published, so that no
file is needed and any shape can be measured that fits; they are the same numbers for everybody who reads them in one
run. Does not know what is measured of them.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api import host, rank
from metaseq_api.bench import peer, shape_host
from metaseq_api.bench.vocabulary import filled_up
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.counted import Loadable
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.rules import split_dim
from metaseq_api.core import ModelConfig
from metaseq_api.core.config import OPT_SHAPES, tensor_shapes
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.launch.child import settle
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.machine import num_cores
from metaseq_api.model.weights import DeviceWeights
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.resident import loaded
from metaseq_api.settings import DEMO, Settings

WAIT_S = 3600.0
"""Units: seconds that ranks wait for an order while another side has its turn."""


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """One whole tensor of random numbers, made when it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: DeviceWeights

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def split(self) -> int | None:
        return split_dim(self.name)

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        return self.weights.tensor(self.name).read(dim, start, stop)


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Stands where a checkpoint stands, and has no files."""

    config: ModelConfig
    device: torch.device
    num_parts: int = 1
    num_shards: int = 1

    def names(self) -> list[str]:
        return list(tensor_shapes(self.config))

    def tensor(self, name: str) -> RandomTensor:
        dtype = DTYPES[self.config.dtype]
        weights = DeviceWeights(self.config, self.device, dtype)
        return RandomTensor(name, tensor_shapes(self.config)[name], dtype, weights)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be measured. `shape` names random weights; None: the checkpoint of the settings."""

    settings: Settings
    shape: str | None

    def open(self, path: Path) -> Loadable:
        """What `rank.prepare` opens. Raises: CheckpointError."""
        if self.shape is None:
            return open_checkpoint(path)
        return RandomModel(OPT_SHAPES[self.shape], default_device(self.settings.device))

    def look(self) -> tuple[ModelConfig, torch.dtype, torch.device]:
        """How it will be run, without loading it. Raises: CheckpointError."""
        device, config = default_device(self.settings.device), self.open(self.settings.checkpoint).config
        return config, default_dtype(self.settings, config, device), device


@dataclass(frozen=True, slots=True)
class Ours:
    """Our engine, to be run in the thread that made it, and what was prepared for it."""

    engine: Engine
    ready: rank.Prepared


def subject(shape: str | None, checkpoint: Path | None, settings: Settings) -> Subject:
    """Random weights of a shape, or a checkpoint. The demo's tokenizer, filled up, goes with the former."""
    if shape is None:
        assert checkpoint is not None
        return Subject(replace(settings, checkpoint=checkpoint, demo=checkpoint == DEMO), None)
    vocab, merges = filled_up(OPT_SHAPES[shape].vocab_size)
    return Subject(replace(settings, checkpoint=Path(shape), bpe_vocab=vocab, bpe_merges=merges), shape)


def default_device(named: str | None) -> torch.device:
    """As the service chooses it; of several GPUs the current one."""
    return torch.device(named or ("cuda" if torch.cuda.is_available() else "cpu"))


def default_dtype(settings: Settings, config: ModelConfig, device: torch.device) -> torch.dtype:
    """As the service chooses it."""
    return DTYPES[settings.dtype or (config.dtype if device.type == "cuda" else "fp32")]


def ours(of: Subject) -> Ours:
    """Load it into this process, over one rank, to be run in this thread: a second one that computes would slow both.

    Raises: MetaseqApiError.
    """
    alone = RankInfo(
        rank=0, world_size=1, local_rank=0, local_world_size=1, node=socket.gethostname(), init="file:///dev/null"
    )
    ready = rank.prepare(of.settings, alone, of.open)
    torch.set_num_threads(ready.threads)
    context = ParallelContext(device=ready.device)
    worker = rank.load(ready, context, of.settings)
    settle()
    engine = rank.make_engine(of.settings, ready, worker, Channel(context))
    engine.prepare()
    return Ours(engine, ready)


@contextlib.contextmanager
def split(of: Subject, num_ranks: int) -> Iterator[Ours]:
    """The same over several ranks that share the threads; the first is in this process. Raises: MetaseqApiError."""
    settings = replace(of.settings, model_parallel=num_ranks, threads=_share(of.settings, num_ranks), timeout_s=WAIT_S)
    module = host.__name__ if of.shape is None else shape_host.__name__
    with loaded(settings, lambda followers: None, module=module, open_weights=of.open) as (engine, ready):
        engine.prepare()
        yield Ours(engine, ready)
        engine.end_by(time.monotonic())
        engine.run()


def theirs(ready: rank.Prepared) -> Any:
    """Hugging Face's model of the same weights, on the same device. Raises: SettingsError where it is not installed."""
    return peer.hugging_face(ready.config, ready.checkpoint, ready.device, ready.dtype)


def _share(settings: Settings, num_ranks: int) -> int:
    return max(1, (settings.threads or num_cores()) // num_ranks)
