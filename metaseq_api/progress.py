"""Signs of life from long work: a bar on a terminal, a line every few seconds in a log.

Knows terminals and bytes. Does not know what is done.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
Progress = Callable[[int], object]
"""Told of each so many bytes that are done."""


@contextlib.contextmanager
def progress_bar(verb: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int], Progress]]:
    """Show bytes done. Gives a function of the total that begins, and returns the Progress. `verb` as in "writing"."""
    with contextlib.ExitStack() as stack:

        def begin(total: int) -> Progress:
            if sys.stderr.isatty() or "ipykernel" in sys.modules:  # a notebook shows a bar, though it is no terminal
                bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc=verb))
                return lambda done: bar.update(done)
            return _Lines(verb, total, clock).update

        yield begin


class _Lines:
    def __init__(self, verb: str, total: int, clock: Callable[[], float]) -> None:
        self._verb, self._total, self._done, self._clock = verb, total, 0, clock
        self._begun = self._told = clock()

    def update(self, done: int) -> None:
        self._done += done
        now = self._clock()
        if self._done < self._total and now - self._told < LOG_EVERY_S:
            return
        self._told = now
        rate = self._done / max(now - self._begun, 1e-9)
        log.info(
            "%s: %sB of %sB (%.0f %%) at %sB/s, %.0f s left",
            self._verb,
            tqdm.format_sizeof(self._done),
            tqdm.format_sizeof(self._total),
            100 * self._done / max(self._total, 1),
            tqdm.format_sizeof(rate),
            (self._total - self._done) / max(rate, 1e-9),
        )
