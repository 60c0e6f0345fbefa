"""One rank: its slice of the model and its KV cache. Runs what it is told; knows no request and samples nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.engine.channel import Channel, Order
from metaseq_api.model.cache import KVCache
from metaseq_api.model.decode_step import DecodeSteps
from metaseq_api.model.opt import OPT
from metaseq_api.model.paths import decode_kernel, plan

LOGIT_ROWS = 256
"""Rows turned into logits at once: 256 x 50272 fp32 numbers are 51 MB, whatever a prompt to be scored is long."""


class Worker:
    """One rank's model and cache. With `graphs`, a GPU that holds a whole model replays its decode steps."""

    def __init__(self, model: OPT, cache: KVCache, *, graphs: bool = True) -> None:
        self.model = model
        self.cache = cache
        self._kernel = decode_kernel(model.context.device)
        self._decode: DecodeSteps | None = None
        if graphs and self._kernel is not None and model.context.tensor_size == 1:
            self._decode = DecodeSteps(model, cache, self._kernel)

    def prepare(self, max_batch_size: int) -> None:
        """Make now what steps of up to so many sequences would otherwise wait for."""
        if self._decode is not None:
            self._decode.prepare(max_batch_size)

    def run(self, batch: Batch) -> Iterator[Tensor | None]:
        """Run one step, and yield the wanted rows' logits in order, LOGIT_ROWS at a time.

        Every rank must exhaust the iterator; what it yields is valid until the next step.
        Shapes: [<= LOGIT_ROWS, V] fp32 on the driver; None on the others.
        """
        if self._decode is not None and self._decode.takes(batch):
            yield self._decode.run(batch)
            return
        hidden_RE = self.model(plan(batch, self.cache, self.model.context.device, self._kernel), self.cache)
        for rows in hidden_RE.split(LOGIT_ROWS) if len(hidden_RE) else ():
            yield self.model.logits(rows)


def follow(worker: Worker, channel: Channel) -> None:
    """A follower's life: take orders until told to stop. Raises: RuntimeError when the driver is lost."""
    with torch.inference_mode():
        while True:
            order, batch = channel.receive()
            if order is Order.STOP:
                return
            if batch is not None:
                for _ in worker.run(batch):
                    pass
