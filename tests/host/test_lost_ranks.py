"""A rank that is stopped, killed or idle: named, or left in peace, with a supervisor above it and without."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import until
from support.service import Service

TIMEOUT_S = 4.0
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
DOOR = "metaseq_api.cli.interactive_hosted"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "constants.py").write_text(f"TIMEOUT_S = {TIMEOUT_S}\n")
    return tmp_path


@pytest.fixture
def supervised(folder: Path) -> Iterator[Service]:
    service = Service(folder, "--model-parallel", "2")
    yield service
    service.kill()


@pytest.fixture
def under_torchrun(folder: Path) -> Iterator[Service]:
    service = Service(folder, "--device", "cpu", door=[*TORCHRUN, DOOR])
    yield service
    service.kill()


def said(service: Service, *words: str) -> str:
    """The line that has all these words, once it is there."""
    lines = service.lines
    return str(until(lambda: next((x for x in lines if all(w in x for w in words)), None), f"{words} in {lines}", 20))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_within_the_timeout_with_every_stack_in_the_log(rank: int, supervised: Service) -> None:
    assert supervised.texts(prompt="x", max_tokens=1)  # it says that it is ready a moment before its engine runs
    pid = supervised.ranks[rank].pid
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    said(supervised, f"rank {rank} of 2 (pid {pid} on ", "is stopped")
    assert time.monotonic() - began < TIMEOUT_S + 1  # of which a second is this machine's to be slow
    assert supervised.end(15) == 20
    assert f"rank {rank} of 2 (pid {pid}" in said(supervised, "error", "was stopped, by SIGSTOP")
    text = "\n".join(supervised.lines)
    # the one that is not stopped may have noticed by itself
    for own in ("in turn", "in follow"):  # rank 0's, rank 1's
        assert own in text or "in _explain" in text, text


def test_an_idle_service_outlives_its_timeout_many_times(supervised: Service) -> None:
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 3 * TIMEOUT_S, "three times the timeout to pass")
    assert supervised.texts(prompt="x", max_tokens=1)
    assert len(supervised.ranks) == 2


def test_sigquit_writes_every_stack_and_changes_nothing(supervised: Service) -> None:
    assert supervised.texts(prompt="x", max_tokens=1)  # it says that it is ready a moment before its engine runs
    shown, lines = {"in receive", "in _take_in"}, supervised.lines
    for _ in range(20):  # just after an answer a rank may yet be in its last step
        supervised.process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(AssertionError):
            until(lambda: all(any(w in x for x in lines) for w in shown), "every stack", 1)
            break
    assert all(any(w in x for x in lines) for w in shown), lines
    assert supervised.texts(prompt="x", max_tokens=1)


def workers(service: Service) -> list[psutil.Process]:
    """Torchrun's workers, in order of rank."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    return sorted((c for c in children if DOOR in c.cmdline()), key=lambda c: int(c.environ()["RANK"]))


def test_a_stopped_rank_that_has_no_supervisor_is_named_by_another_which_has_its_stack(under_torchrun: Service) -> None:
    pid = workers(under_torchrun)[1].pid
    os.kill(pid, signal.SIGSTOP)
    until(lambda: under_torchrun.process.poll() is not None, "the end", 4 / 3 * TIMEOUT_S + 20)
    line = said(under_torchrun, "error: lost rank 1", f"(pid {pid} on ")
    assert "it was stopped, by SIGSTOP" in line
    assert said(under_torchrun, "in receive")


def test_a_killed_rank_that_has_no_supervisor_is_named_by_the_other(under_torchrun: Service) -> None:
    one = workers(under_torchrun)[1]
    one.kill()
    said(under_torchrun, "error: lost rank 1", f"(pid {one.pid} on ")
    until(lambda: under_torchrun.process.poll() is not None, "the end", 20)
