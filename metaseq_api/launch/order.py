"""What a supervisor tells each rank it starts, and what a failing rank tells it back. JSON both ways, no pickle.

Knows how Settings and RankInfo are written. Does not know processes or signals. The order travels on the child's
standard input, so that it shows up in no environment and no process list.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaseq_api.errors import MetaseqApiError
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Be this rank, with these settings."""

    settings: Settings
    rank: RankInfo
    terms: Terms
    listen_fd: int | None
    """The listening socket, inherited; rank 0 alone has one."""
    words_fd: int
    """A file, inherited, for the one line that this rank ends by."""
    parent_pid: int
    verbose: bool

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["settings"] = settings_to_dict(self.settings)
        fields["rank"], fields["terms"] = dataclasses.asdict(self.rank), dataclasses.asdict(self.terms)
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Order:
        fields = json.loads(text)
        fields["settings"] = settings_from_dict(fields["settings"])
        fields["rank"], fields["terms"] = RankInfo(**fields["rank"]), Terms(**fields["terms"])
        return cls(**fields)


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """Settings as JSON knows them: paths are strings."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}


def settings_from_dict(fields: dict[str, Any]) -> Settings:
    """The Settings that `settings_to_dict` wrote."""
    paths = {f.name for f in dataclasses.fields(Settings) if "Path" in str(f.type)}
    values: dict[str, Any] = {k: Path(v) if k in paths and v is not None else v for k, v in fields.items()}
    return Settings(**values)


def write_last_words(fd: int, error: MetaseqApiError) -> None:
    """Leave the one line that a rank ends by."""
    os.pwrite(fd, json.dumps({"message": str(error)}).encode(), 0)


def read_last_words(fd: int) -> str | None:
    """The line a rank left, or None where it left none, or died while writing it."""
    try:
        return str(json.loads(os.pread(fd, 1 << 20, 0))["message"])
    except (ValueError, KeyError):
        return None
