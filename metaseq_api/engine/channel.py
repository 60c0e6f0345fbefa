"""Orders from the driver to the other ranks: plain integers over gloo, never a pickle.

Knows three orders: run this Batch, still here, stop. Does not know what a rank does with them.
"""

from __future__ import annotations

import time
from array import array
from enum import IntEnum

import torch
import torch.distributed as dist

from metaseq_api.core import Batch
from metaseq_api.parallel.context import ParallelContext

CAPACITY = 1024
"""Integers of the first message; a larger Batch sends the rest in a second one."""


class Order(IntEnum):
    STOP = 0
    STEP = 1
    HEARTBEAT = 2


class Channel:
    """One end of the line; on a single rank it does nothing."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._alone = context.tensor_size == 1
        self._buffer = torch.zeros(CAPACITY, dtype=torch.int32)
        self.last_heard = time.monotonic()
        """When all ranks last took part in something. Units: seconds of the monotonic clock."""

    def send_batch(self, batch: Batch) -> None:
        """Driver: have every rank run `batch`."""
        self._send(Order.STEP, batch.pack())

    def send_heartbeat(self) -> None:
        """Driver: show that it lives, and learn that the others do. Raises: RuntimeError when one is lost."""
        self._send(Order.HEARTBEAT, array("i"))
        self._meet()

    def send_stop(self) -> None:
        """Driver: end the others' loops."""
        self._send(Order.STOP, array("i"))

    def receive(self) -> tuple[Order, Batch | None]:
        """Follower: wait for the next order. Raises: RuntimeError when the driver is lost."""
        dist.broadcast(self._buffer, src=0, group=self._context.control)
        kind, length = int(self._buffer[0]), int(self._buffer[1])
        words = self._buffer[2 : 2 + length]
        if length > CAPACITY - 2:
            rest = torch.empty(length - (CAPACITY - 2), dtype=torch.int32)
            dist.broadcast(rest, src=0, group=self._context.control)
            words = torch.cat([self._buffer[2:], rest])
        self.last_heard = time.monotonic()
        if kind == Order.HEARTBEAT:
            self._meet()
        return Order(kind), Batch.unpack(words.tolist()) if kind == Order.STEP else None

    def _send(self, order: Order, words: array[int]) -> None:
        if self._alone:
            self.last_heard = time.monotonic()
            return
        payload = torch.frombuffer(words, dtype=torch.int32) if words else torch.empty(0, dtype=torch.int32)
        fits = payload[: CAPACITY - 2]
        self._buffer[0], self._buffer[1] = int(order), len(payload)
        self._buffer[2 : 2 + len(fits)] = fits
        dist.broadcast(self._buffer, src=0, group=self._context.control)
        if len(payload) > len(fits):
            dist.broadcast(payload[len(fits) :].clone(), src=0, group=self._context.control)

    def _meet(self) -> None:
        if not self._alone:
            dist.all_reduce(torch.zeros(1), group=self._context.control)
            self.last_heard = time.monotonic()
