"""One rank: its slice of the model and its KV cache. Runs what it is told; knows no request and samples nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.engine.channel import Channel, Order
from metaseq_api.model.attention import plan_step
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT

LOGIT_ROWS = 256
"""Rows turned into logits at once: 256 x 50272 fp32 numbers are 51 MB, whatever a prompt to be scored is long."""


class Worker:
    def __init__(self, model: OPT, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    def run(self, batch: Batch) -> Iterator[Tensor | None]:
        """Run one step, and yield the wanted rows' logits in order, LOGIT_ROWS at a time.

        Every rank must exhaust the iterator. Shapes: [<= LOGIT_ROWS, V] fp32 on the driver; None on the others.
        """
        plan = plan_step(batch, self.cache, self.model.context.device)
        hidden_RE = self.model(plan, self.cache)
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
