"""Logging, set up once by a door: one line a record, the rank in it, to standard error.

Knows the format. Does not know what is logged; the library only ever calls `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import logging
import sys


def setup(who: int | str = "", *, verbose: bool = False) -> None:
    """Send this process's records to standard error, marked with who it is: a service's rank, or another part of it."""
    mark = f" rank{who}" if isinstance(who, int) else f" {who}" if who else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s{mark} %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    for noisy in ("waitress", "urllib3", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
