"""Whether the engine gets on: how long a step takes, how long ago each rank was heard of, and when that is too long.

Knows the times and the bounds. Does not know what a step computes, or what is done about a rank that is stuck: the
service goes on to wait for it until TIMEOUT_S, when torch.distributed gives it up and the job ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from metaseq_api.core import Stats
from metaseq_api.engine.channel import Channel

PATIENCE = 4
"""A step is too slow when it takes so many times what the slowest one took, and longer than two heartbeats."""


class Pulse:
    """`heartbeat_s` is a third of TIMEOUT_S. The engine's thread writes, any thread asks."""

    def __init__(self, channel: Channel, stats: Stats, heartbeat_s: float) -> None:
        self._channel, self._stats, self._heartbeat_s = channel, stats, heartbeat_s
        self._step_began: float | None = None
        self.begun = False
        """Whether the engine's loop has: before that nothing is wrong, but nobody is answered."""

    def begin(self) -> None:
        self._channel.note_all(time.monotonic())  # they have just loaded
        self.begun = True

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Around a step, or what is prepared between two."""
        self._step_began = time.monotonic()
        try:
            yield
        finally:
            self._step_began = None

    def step_age_s(self, now: float) -> float | None:
        began = self._step_began
        return None if began is None else max(now - began, 0.0)

    def complaint(self, now: float) -> str:
        """What is stuck; "" where nothing is."""
        if not self.begun:
            return ""
        step_s = self.step_age_s(now)
        if step_s is not None:
            most = max(2 * self._heartbeat_s, PATIENCE * self._stats.slowest_step_s)
            return f"a step has been running for {step_s:.0f} s; some rank is stuck" if step_s > most else ""
        # a rank is heard of every heartbeat: at twice that it is late, and still within TIMEOUT_S
        late = [str(r) for r, age in enumerate(self._channel.ages_s(now)) if age > 2 * self._heartbeat_s]
        if not late:
            return ""
        behind = "; one of them is stuck, and the others get their orders through it" if len(late) > 1 else ""
        return f"rank {', '.join(late)} not heard of for {2 * self._heartbeat_s:.0f} s{behind}"
