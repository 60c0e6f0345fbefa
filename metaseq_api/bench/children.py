"""Processes of a measurement's own, talked to by lines. Knows how they begin and end; not what they do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SAFE = ["-P"] if sys.version_info >= (3, 11) else []


@contextmanager
def child_of(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs this code. Ctrl-C is not its own but its parent's, which ends it however it goes on."""
    with subprocess.Popen(
        [sys.executable, *SAFE, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
