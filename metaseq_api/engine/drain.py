"""How fast sequences leave the engine, and so when there will be room again. Plain Python.

Knows how many ended and how long the engine was busy. Does not know requests. Both sums fade alike, so that the last
half minute of work counts; time in which nothing was in work does not count, or a rest would look like a slow engine.
"""

from __future__ import annotations

import math

TAU_S = 30.0
"""Units: seconds of work after which what was seen counts for 1/e."""
MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0


class DrainRate:
    """Sequences a second, exponentially weighted. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._num, self._busy_s = 0.0, 0.0
        self._at: float | None = None

    def begin(self, now: float) -> None:
        """Work has come; harmless where there was some already."""
        if self._at is None:
            self._at = now

    def note(self, num: int, now: float, *, idle: bool) -> None:
        """`num` sequences have ended; `idle` says that none is left."""
        self._num, self._busy_s = self._faded(now)
        self._num += num
        self._at = None if idle else now

    def wait_s(self, num: int, now: float) -> float:
        """When `num` more will have ended, within bounds a client can use. Units: seconds."""
        ended, busy_s = self._faded(now)
        # before anything has ended, that one will next is the best guess there is
        return min(max(num * busy_s / max(ended, 1.0), MIN_WAIT_S), MAX_WAIT_S)

    def _faded(self, now: float) -> tuple[float, float]:
        passed = 0.0 if self._at is None else max(now - self._at, 0.0)
        kept = math.exp(-passed / TAU_S)
        return self._num * kept, self._busy_s * kept + TAU_S * (1 - kept)
