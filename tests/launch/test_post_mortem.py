"""What a look at a process says of it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest
from support.processes import until

from metaseq_api.launch.post_mortem import is_held, state_of


@pytest.fixture
def sleeper():  # type: ignore[no-untyped-def]
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_one_that_is_stopped_is_held_until_it_goes_on(sleeper: subprocess.Popen[bytes]) -> None:
    assert not is_held(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    until(lambda: state_of(sleeper.pid).startswith("stopped"), "it to stop")
    assert is_held(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGCONT)
    until(lambda: not is_held(sleeper.pid), "it to go on")


def test_one_that_is_stopped_for_moments_as_profilers_do_is_not_held(sleeper: subprocess.Popen[bytes]) -> None:
    ended = threading.Event()

    def profile() -> None:
        while not ended.is_set():
            os.kill(sleeper.pid, signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(sleeper.pid, signal.SIGCONT)
            time.sleep(0.03)

    profiler = threading.Thread(target=profile)
    profiler.start()
    try:
        stopped = [state_of(sleeper.pid).startswith("stopped") for _ in range(60) if not time.sleep(0.01)]  # type: ignore[func-returns-value]
        assert any(stopped)
        assert not any(is_held(sleeper.pid) for _ in range(5))
    finally:
        ended.set()
        profiler.join()


def test_one_that_is_not_there_is_not_held() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not is_held(gone.pid)
    assert state_of(gone.pid) == "gone"
