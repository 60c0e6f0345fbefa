"""Orders from the driver to the other ranks: plain integers over gloo, never a pickle.

Knows four orders: run this Batch, prepare for the next, still here, stop. Does not know what a rank does with them.
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
    PREPARE = 3


class Channel:
    """One end of the line; on a single rank it does nothing."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._alone = context.tensor_size == 1
        self._buffer = torch.zeros(CAPACITY, dtype=torch.int32)
        self._heard = [time.monotonic()] * context.tensor_size
        self._meeting = False

    @property
    def last_heard(self) -> float:
        """When the rank that was heard of longest ago was. Units: seconds of the monotonic clock."""
        return min(self._heard)

    def note_all(self, now: float) -> None:
        """Driver: every rank has taken part in something."""
        self._heard = [now] * len(self._heard)

    def ages_s(self, now: float) -> tuple[float, ...]:
        """Driver: how long ago each rank was last known to live.

        A heartbeat is answered by each rank for itself, but comes to some through others (gloo hands it on in a tree),
        which are then late with it; of a step it is known only when all have done it, so that during one all ages
        grow alike. The driver that waits for a heartbeat's answers lives.
        """
        meeting = self._meeting
        return tuple(0.0 if meeting and r == 0 else max(now - t, 0.0) for r, t in enumerate(self._heard))

    def send_batch(self, batch: Batch) -> None:
        """Driver: have every rank run `batch`."""
        self._send(Order.STEP, array("i") if self._alone else batch.words)

    def send_prepare(self) -> None:
        """Driver: have every rank make what is missing next (`Worker.prepare_next`)."""
        self._send(Order.PREPARE, array("i"))

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
        if kind == Order.HEARTBEAT:
            dist.send(torch.tensor([self._context.rank], dtype=torch.int32), 0, group=self._context.control)
        return Order(kind), Batch.unpack(words.tolist()) if kind == Order.STEP else None

    def _send(self, order: Order, words: array[int]) -> None:
        if self._alone:
            self.note_all(time.monotonic())
            return
        payload = torch.frombuffer(words, dtype=torch.int32) if words else torch.empty(0, dtype=torch.int32)
        fits = payload[: CAPACITY - 2]
        self._buffer[0], self._buffer[1] = int(order), len(payload)
        self._buffer[2 : 2 + len(fits)] = fits
        dist.broadcast(self._buffer, src=0, group=self._context.control)
        if len(payload) > len(fits):
            dist.broadcast(payload[len(fits) :].clone(), src=0, group=self._context.control)

    def _meet(self) -> None:
        """Wait for the answer of every other rank, in the order in which they come."""
        if self._alone:
            return
        answer = torch.zeros(1, dtype=torch.int32)
        self._meeting = True
        for _ in range(1, len(self._heard)):
            dist.recv(answer, group=self._context.control)
            self._heard[int(answer)] = time.monotonic()
        self._heard[0] = time.monotonic()
        self._meeting = False
