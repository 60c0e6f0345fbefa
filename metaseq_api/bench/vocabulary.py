"""Tokens for random weights: the demo's, and as many made up as a shape has more.

So choosing among all costs what it does in earnest. Knows the demo's files.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from metaseq_api.settings import DEMO


@functools.cache
def filled_up(num_tokens: int) -> tuple[Path, Path]:
    """A vocab and a merges file; the former lies there until this process ends."""
    ids = json.loads((DEMO / "vocab.json").read_text("utf-8"))
    ids |= {f"\u0120made{n}": n for n in range(len(ids), num_tokens)}
    folder = Path(tempfile.mkdtemp(prefix="metaseq-api-bench-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    return folder / "vocab.json", DEMO / "merges.txt"
