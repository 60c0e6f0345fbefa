"""What the doors on checkpoints share: metaseq's spelling of flags, a sign of progress, an error in one line.

Knows terminals and exit codes. Does not know what a door does.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metaseq_api.checkpoint.write import Progress
from metaseq_api.errors import CheckpointNotFound, MetaseqApiError

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0


class Parser(argparse.ArgumentParser):
    """Takes `--like-this` and `--like_this`, as python-fire did for metaseq."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(arg) for arg in given], namespace)

    def add_switch(self, flag: str, default: bool | None, help_: str) -> None:
        """Add a flag that takes True or False, or nothing for True."""
        self.add_argument(flag, nargs="?", const=True, default=default, type=_boolean, metavar="True|False", help=help_)


def _dashed(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def expand(patterns: Sequence[str]) -> list[Path]:
    """List the files that patterns match. Raises: CheckpointNotFound."""
    paths: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not found:
            raise CheckpointNotFound(f"--input {pattern} matches no file; give the path or pattern of existing files")
        paths += map(Path, found)
    return list(dict.fromkeys(paths))


def guarded(job: Callable[[], object]) -> int:
    """Run a door's job; an error the user can act on becomes one line and its exit code."""
    try:
        job()
    except MetaseqApiError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; files that were not finished do not have their final name", file=sys.stderr)  # noqa: T201
        return 130
    return 0


@contextlib.contextmanager
def progress_bar(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int], Progress]]:
    """Show bytes done: a bar on a terminal, a line every few seconds in a log. Gives what a job calls `progress`."""
    with contextlib.ExitStack() as stack:

        def begin(total: int) -> Progress:
            if sys.stderr.isatty():
                bar: Any = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="writing"))
                return lambda done: bar.update(done)
            return _Lines(total, clock).update

        yield begin


class _Lines:
    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self._total, self._done, self._clock = total, 0, clock
        self._begun = self._told = clock()

    def update(self, done: int) -> None:
        self._done += done
        now = self._clock()
        if self._done < self._total and now - self._told < LOG_EVERY_S:
            return
        self._told = now
        rate = self._done / max(now - self._begun, 1e-9)
        log.info(
            "wrote %sB of %sB (%.0f %%) at %sB/s, %.0f s left",
            tqdm.format_sizeof(self._done),
            tqdm.format_sizeof(self._total),
            100 * self._done / max(self._total, 1),
            tqdm.format_sizeof(rate),
            (self._total - self._done) / max(rate, 1e-9),
        )
