"""Hooks are called when they are due, and none after the end."""

from __future__ import annotations

import threading
import time

from metaseq_api.launch.countdown import Countdown, Hooks


def test_hooks_are_called_in_order_what_was_due_before_at_once_and_a_failure_ends_nothing() -> None:
    called: list[str] = []
    over = threading.Event()

    def fail() -> None:
        called.append("400")
        raise OSError("no sbatch here")

    hooks = Hooks(
        ready=called.append,
        at_seconds_left={299.9: over.set, 600.0: lambda: called.append("600"), 400.0: fail},
    )
    countdown = Countdown(hooks, "http://n1:6010", time.time() + 300)
    countdown.start()
    assert over.wait(10)
    countdown.join(10)
    assert called == ["http://n1:6010", "600", "400"]


def test_a_job_without_a_limit_has_only_its_readiness_told() -> None:
    called: list[str] = []
    countdown = Countdown(Hooks(ready=called.append, at_seconds_left={1e9: lambda: called.append("late")}), "u", None)
    countdown.start()
    countdown.join(10)
    assert called == ["u"]


def test_nothing_is_called_once_it_was_stopped() -> None:
    called: list[str] = []
    countdown = Countdown(Hooks(at_seconds_left={1.0: lambda: called.append("x")}), "u", time.time() + 3600)
    countdown.start()
    countdown.stop()
    countdown.join(10)
    assert called == []
