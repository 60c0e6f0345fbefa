"""What looking at a checkpoint found: said by whoever looked, shown by the doors. Knows neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or, where it is not `fatal`, only remarkable."""

    path: Path
    what: str
    fatal: bool = True
