"""A throw-away SLURM as a pytest fixture, or the reason why there is none."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")


def _run(*args: str, **more: str) -> str | None:
    """The reason why the script failed, or None."""
    env = os.environ | more
    argv = ["bash", str(SCRIPT), *args]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=180, check=False)
    return None if done.returncode == 0 else done.stderr.strip() or f"slurm_cluster.sh {args[0]} failed"


def cluster(
    *, nodes: int, gpus: int, cpus: int, kill_wait_s: int = 3, preempt: str = "", grace_time_s: int = 0
) -> Iterator[Path]:
    """Yield the slurm.conf of a cluster that stands until the generator is resumed; skip where none can be had.

    `preempt` (REQUEUE, CANCEL) adds a partition `urgent`, whose jobs push others aside.
    """
    more = {"KILL_WAIT": str(kill_wait_s), "PREEMPT": preempt, "GRACE_TIME": str(grace_time_s or "")}
    with tempfile.TemporaryDirectory(prefix="slurm-") as parent:
        folder = Path(parent) / "cluster"
        try:
            if reason := _run("install") or _run("start", str(folder), *map(str, (nodes, gpus, cpus)), **more):
                pytest.skip(f"no SLURM here: {reason}")
            yield folder / "slurm.conf"
        finally:
            _run("stop", str(folder))
