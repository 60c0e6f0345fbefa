"""Limits by the minute fill evenly, are given back where they were not used, and say when there is enough again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaseq_api.core import Request, SamplingParams
from metaseq_api.errors import QuotaExceeded, RateLimited
from metaseq_api.server.key_file import make_key
from metaseq_api.server.quota import MAX_CONCURRENCY, Bucket, Quotas, cost


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_let_through_evenly_and_the_wait_is_true() -> None:
    clock = Clock()
    quotas, key = Quotas(clock), make_key("a", "x" * 20, requests_per_minute=30)
    for _ in range(30):
        quotas.count_request(key)
    with pytest.raises(RateLimited) as caught:
        quotas.count_request(key)
    assert caught.value.retry_after_s == pytest.approx(2)
    clock.now += 1.99
    with pytest.raises(RateLimited):
        quotas.count_request(key)
    clock.now += 0.02
    quotas.count_request(key)


def test_tokens_not_used_are_given_back_once() -> None:
    clock = Clock()
    quotas, key = Quotas(clock), make_key("a", "x" * 20, tokens_per_minute=100)
    charge = quotas.admit(key, 80)
    with pytest.raises(RateLimited) as caught:
        quotas.admit(key, 50)
    assert caught.value.retry_after_s == pytest.approx(18)
    charge.num_used = 10
    charge.settle()
    charge.settle()
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "90"
    quotas.admit(key, 90)


def test_a_charge_nobody_knows_the_use_of_stays() -> None:
    quotas, key = Quotas(Clock()), make_key("a", "x" * 20, tokens_per_minute=100)
    quotas.admit(key, 80).settle()
    assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "20"


def test_what_never_fits_is_no_matter_of_waiting() -> None:
    quotas, key = Quotas(Clock()), make_key("a", "x" * 20, tokens_per_minute=100, concurrency=1)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.admit(key, 101)
    assert (caught.value.retry_after_s, caught.value.worth_retrying) == (None, False)
    quotas.admit(key, 100)  # and the refused one took no place


def test_places_are_free_again_when_their_requests_end() -> None:
    quotas, key = Quotas(Clock()), make_key("a", "x" * 20, concurrency=2)
    first, _ = quotas.admit(key, 1), quotas.admit(key, 1)
    with pytest.raises(RateLimited, match="2 requests in work"):
        quotas.admit(key, 1)
    first.settle()
    quotas.admit(key, 1)


def test_keys_do_not_share_limits_and_a_changed_limit_counts_at_once() -> None:
    quotas = Quotas(Clock())
    a, b = (make_key(name, "x" * 20, requests_per_minute=1, concurrency=1) for name in "ab")
    running = quotas.admit(a, 1)
    quotas.count_request(a)
    quotas.count_request(b)
    with pytest.raises(RateLimited):
        quotas.count_request(a)
    wider = make_key("a", "x" * 20, requests_per_minute=2, concurrency=1)
    quotas.count_request(wider)
    with pytest.raises(RateLimited):
        quotas.admit(wider, 1)  # what runs still counts
    running.settle()
    quotas.admit(wider, 1)


def test_headers_are_those_of_openai_and_only_for_limits_there_are() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    assert quotas.headers(make_key("free", "x" * 20)) == {}
    key = make_key("a", "x" * 20, requests_per_minute=60, tokens_per_minute=600)
    quotas.count_request(key)
    quotas.admit(key, 595)
    assert quotas.headers(key) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "5",
        "x-ratelimit-reset-tokens": "1m0s",
    }


def test_every_sample_counts_and_a_prompt_once() -> None:
    params = SamplingParams(max_tokens=10, n=2, best_of=3)
    assert cost(Request(request_id="r", prompts=((1, 2), (3,)), params=params)) == 3 + 2 * 3 * 10


@given(
    per_minute=st.integers(1, 1000),
    script=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=60),
)
def test_in_no_span_does_more_get_through_than_a_minute_holds_and_refills(
    per_minute: int, script: list[tuple[float, int]]
) -> None:
    now, bucket, passed = 0.0, Bucket(per_minute, 0.0), 0
    for wait, amount in script:
        now += wait
        if not bucket.wait_s(amount, now):
            bucket.take(amount, now)
            passed += amount
        elif amount <= per_minute:
            now += bucket.wait_s(amount, now) + 1e-6
            assert bucket.wait_s(amount, now) < 1e-3, "the wait that was told is enough"
    assert passed <= per_minute * (1 + now / 60) + 1e-6


def test_a_key_without_a_limit_of_its_own_leaves_room_for_others() -> None:
    quotas, key = Quotas(Clock()), make_key("a", "x" * 20)
    charges = [quotas.admit(key, 1) for _ in range(MAX_CONCURRENCY)]
    with pytest.raises(RateLimited, match="wait for one to end"):
        quotas.admit(key, 1)
    quotas.admit(make_key("b", "y" * 20), 1)
    charges[0].settle()
    quotas.admit(key, 1)
