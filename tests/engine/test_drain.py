"""The rate at which sequences leave tells when there will be room."""

from __future__ import annotations

import pytest

from metaseq_api.engine.drain import MAX_WAIT_S, MIN_WAIT_S, DrainRate


def steady(per_s: float, seconds: float) -> tuple[DrainRate, float]:
    drain, now = DrainRate(), 100.0
    drain.begin(now)
    for _ in range(int(seconds * per_s)):
        now += 1 / per_s
        drain.note(1, now, idle=False)
    return drain, now


@pytest.mark.parametrize("per_s", [0.5, 4.0, 50.0])
def test_the_wait_is_what_the_rate_makes_of_it(per_s: float) -> None:
    drain, now = steady(per_s, 120)
    for num in (10, 20):
        assert drain.wait_s(num, now) == pytest.approx(min(max(num / per_s, 1), 60), rel=0.05)


def test_it_stays_within_bounds_a_client_can_use() -> None:
    drain, now = steady(50, 30)
    assert drain.wait_s(1, now) == MIN_WAIT_S
    assert drain.wait_s(10**6, now) == MAX_WAIT_S


def test_a_rest_does_not_look_like_a_slow_engine() -> None:
    drain, now = steady(4, 60)
    drain.note(1, now, idle=True)
    drain.begin(now + 3600)
    assert drain.wait_s(40, now + 3600) == pytest.approx(10, rel=0.1)


def test_an_engine_that_stands_still_sends_clients_further_away() -> None:
    drain, now = steady(4, 60)
    waits = [drain.wait_s(8, now + later) for later in (0, 30, 120)]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_WAIT_S


def test_before_anything_has_ended_the_time_so_far_is_the_guess() -> None:
    drain = DrainRate()
    assert drain.wait_s(1, 5.0) == MIN_WAIT_S
    drain.begin(5.0)
    drain.begin(6.0)
    assert drain.wait_s(2, 10.0) == pytest.approx(10, rel=0.1)


def test_it_follows_a_change_within_a_minute_or_two() -> None:
    drain, now = steady(10, 60)
    for _ in range(60):
        now += 1
        drain.note(1, now, idle=False)
    assert drain.wait_s(20, now) > 8
