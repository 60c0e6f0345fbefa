"""When the engine says that it is stuck, by the times it is given."""

from __future__ import annotations

import time

import pytest

from metaseq_api.core import Stats
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.pulse import Pulse
from metaseq_api.parallel.context import ParallelContext

HEARTBEAT_S = 10.0


@pytest.fixture
def channel() -> Channel:
    return Channel(ParallelContext(tensor_size=3))


@pytest.fixture
def pulse(channel: Channel) -> Pulse:
    pulse = Pulse(channel, Stats(), HEARTBEAT_S)
    pulse.begin()
    return pulse


def test_nothing_is_wrong_before_the_engine_has_begun(channel: Channel) -> None:
    pulse = Pulse(channel, Stats(), HEARTBEAT_S)
    assert not pulse.begun
    assert pulse.complaint(time.monotonic() + 1000) == ""


def test_ranks_are_late_at_twice_the_heartbeat(pulse: Pulse) -> None:
    now = time.monotonic()
    assert pulse.complaint(now + 19) == ""
    assert pulse.complaint(now + 21).startswith("rank 0, 1, 2 not heard of for 20 s; one of them")


def test_a_step_is_too_long_at_twice_the_heartbeat_or_four_times_the_slowest(channel: Channel) -> None:
    stats = Stats()
    pulse = Pulse(channel, stats, HEARTBEAT_S)
    pulse.begin()
    now = time.monotonic()
    assert pulse.step_age_s(now) is None
    with pulse.beating():
        assert pulse.step_age_s(now + 5) == pytest.approx(5, abs=0.5)
        assert pulse.complaint(now + 19) == ""
        assert "a step has been running" in pulse.complaint(now + 21)
        stats.step([1], 1, [], began=0.0, now=30.0)  # a slow machine
        assert pulse.complaint(now + 119) == ""
        assert "a step has been running" in pulse.complaint(now + 121)
    assert pulse.step_age_s(now) is None
