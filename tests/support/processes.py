"""Real processes under test: started in a clean environment, waited for with a deadline, counted when all is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).parents[1]
DEADLINE_S = 30.0


def until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait for a condition to hold, and return what it said."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.005)
    return value


def gone(pid: int) -> bool:
    """Whether a process has ended; one that only its parent has not yet asked about counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def children(pid: int) -> list[psutil.Process]:
    """All below a process that have not ended."""
    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if not gone(p.pid)]
    except psutil.NoSuchProcess:
        return []


def command(process: psutil.Process) -> list[str]:
    """Its command line; none where it has ended meanwhile."""
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def clean_env(**more: str) -> dict[str, str]:
    """This environment without what a launcher or an operator may have left in it."""
    launchers = ("SLURM", "TORCHELASTIC", "METASEQ_API", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(launchers) and k not in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    } | more


class Family:
    """A parent, started by `argv`, and the dummy ranks that report in `folder`."""

    def __init__(self, argv: Sequence[str], folder: Path, **env: str) -> None:
        self.folder = folder
        self.temp = folder / "tmp"
        self.temp.mkdir(exist_ok=True)
        (folder / "cwd").mkdir(exist_ok=True)
        self.parent = subprocess.Popen(
            argv,
            cwd=folder / "cwd",
            env=clean_env(DUMMY_DIR=str(folder), TMPDIR=str(self.temp), PYTHONPATH=str(TESTS), **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def up(self, num_ranks: int) -> list[dict[str, Any]]:
        """Wait until every rank has reported, and return the reports."""
        files = [self.folder / f"rank{r}.json" for r in range(num_ranks)]
        until(lambda: all(f.exists() for f in files) or self.parent.poll() is not None, "every rank to be up")
        assert all(f.exists() for f in files), self.end()
        return [json.loads(f.read_text()) for f in files]

    def go(self) -> None:
        (self.folder / "go").touch()

    def end(self) -> tuple[int, str]:
        """Wait for the parent: its exit code, and all it and its children wrote to standard error."""
        _, err = self.parent.communicate(timeout=DEADLINE_S)
        return self.parent.returncode, err

    def pids(self) -> list[int]:
        return [json.loads(f.read_text())["pid"] for f in self.folder.glob("rank*.json")]

    def assert_nothing_left_running(self) -> None:
        """No process outlives the parent."""
        until(lambda: all(gone(pid) for pid in self.pids()), "every rank to be gone", seconds=5)

    def assert_nothing_left(self) -> None:
        """No process and no file outlives the parent."""
        self.assert_nothing_left_running()
        assert list(self.temp.iterdir()) == []


@contextlib.contextmanager
def family(argv: Sequence[str], folder: Path, **env: str) -> Iterator[Family]:
    """A Family of which nothing is left, whatever the test found."""
    f = Family(argv, folder, **env)
    try:
        yield f
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(f.parent.pid, signal.SIGKILL)
        f.parent.communicate()
