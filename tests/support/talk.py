"""Doors that ask, run as a person would: arguments and standard input in; what was written, and the exit code, out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.processes import clean_env


def door(name: str) -> list[str]:
    return [sys.executable, "-P" if sys.version_info >= (3, 11) else "-E", "-m", f"metaseq_api.cli.{name}"]


def run(name: str, *arguments: str, cwd: Path, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a door to its end."""
    return subprocess.run(
        [*door(name), *arguments],
        cwd=cwd,
        env=clean_env(OMP_NUM_THREADS="1", **env),
        input=given,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
