"""One rank: its slice of the model and its KV cache. Runs what it is told; knows no request and samples nothing.

On a GPU the driver may run ahead: it gives the order for a step before it has read what the step before drew. Such
tokens stay on the device, every rank having them, and an order names them by their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.engine.channel import Channel, Order
from metaseq_api.model.cache import KVCache
from metaseq_api.model.decode_step import DecodeSteps, known, ladder
from metaseq_api.model.opt import OPT
from metaseq_api.model.paths import GpuKernels, gpu_kernels, plan

LOGIT_ROWS = 256
"""Rows turned into logits at once: 256 x 50272 fp32 numbers are 51 MB, whatever a prompt to be scored is long."""


class Worker:
    """One rank's model and cache. With `graphs`, a GPU replays its decode steps.

    max_ahead: how many tokens the driver may leave unread; 0: none, it waits for each step. kernels: others than the
    device's usual ones.
    """

    def __init__(
        self,
        model: OPT,
        cache: KVCache,
        *,
        graphs: bool = True,
        max_ahead: int = 0,
        kernels: GpuKernels | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self._drawn = torch.zeros(max_ahead, dtype=torch.int32, device=model.context.device) if max_ahead else None
        self._room: Tensor | None = None
        self._takes_room: bool = model.embed.output.takes_room
        self._kernels = kernels or gpu_kernels(model.context.device)
        self._decode: DecodeSteps | None = None
        self._missing: list[int] = []  # sizes of its steps that are still to be made, the last one next
        self.wanted = False
        """Whether the last step would have been faster with what `prepare_next` makes."""
        if graphs and self._kernels is not None:
            self._decode = DecodeSteps(model, cache, self._kernels, self._drawn)

    @property
    def runs_ahead(self) -> bool:
        return self._drawn is not None

    def prepare(self, max_batch_size: int, *, first: bool = False) -> None:
        """Make what steps of up to so many sequences are faster with; or the `first` part of it, whose memory serves
        all, and leave the rest to `prepare_next`, what few sequences want before what many do."""
        if self._decode is None:
            return
        *others, largest = ladder(max_batch_size)
        self._missing = [*reversed(others), largest]
        for _ in range(1 if first else len(self._missing)):
            self.prepare_next()

    @property
    def unprepared(self) -> bool:
        """Whether there is something for `prepare_next` to do."""
        return bool(self._missing)

    def prepare_next(self) -> None:
        """Make one more; every rank must, after the same step."""
        assert self._decode is not None
        self._decode.step(self._missing[-1])
        self._missing.pop()
        self.wanted = False

    def run(self, batch: Batch) -> Iterator[Tensor | None]:
        """Run one step, and yield the wanted rows' logits in order, LOGIT_ROWS at a time.

        Every rank must exhaust the iterator; what it yields is valid until it goes on. On a CPU the next logits take
        the same place: fresh pages for 256 rows of 50272 took 25 of 61 ms (2026-11-29, two cores with AMX).
        Shapes: [<= LOGIT_ROWS, V] fp32 on the driver; None on the others.
        """
        if self._decode is not None and self._decode.takes(batch):
            size = ladder(len(batch.items))[-1]
            self.wanted = size in self._missing
            if not self.wanted:
                yield self._decode.step(size).run(batch)
                return
            self._missing.remove(size)
            self._missing.append(size)
        step = plan(batch, self.cache, self.model.context.device, self._kernels)
        if self._drawn is not None and any(i.token_ids[-1] < 0 for i in batch.items):
            step = replace(step, token_ids_T=known(step.token_ids_T, self._drawn))
        hidden_RE = self.model(step, self.cache)
        for rows in hidden_RE.split(LOGIT_ROWS) if len(hidden_RE) else ():
            logits = self.model.logits(rows, self._room)
            if self._takes_room and logits is not None and (self._room is None or len(logits) > len(self._room)):
                self._room = logits
            yield logits

    def keep(self, batch: Batch, chosen: Sequence[Tensor] = ()) -> None:
        """Have every rank keep what the driver drew from a step's logits, for the next step to be fed. Shapes: [R]."""
        if self._drawn is None or not any(i.num_logits for i in batch.items):
            return
        if chosen:
            tokens = chosen[0] if len(chosen) == 1 else torch.cat(list(chosen))
            self._drawn[: len(tokens)].copy_(tokens)
        self.model.context.spread(self._drawn)


def follow(worker: Worker, channel: Channel) -> None:
    """A follower's life: take orders until told to stop. Raises: RuntimeError when the driver is lost."""
    with torch.inference_mode():
        while True:
            order, batch = channel.receive()
            if order is Order.STOP:
                return
            if order is Order.PREPARE:
                worker.prepare_next()
            if batch is not None:
                for _ in worker.run(batch):
                    pass
                worker.keep(batch)
