"""What the engine counts: the times of a sequence's life, by a clock of the test's."""

from __future__ import annotations

from metaseq_api.core import Histogram, Stats


def test_a_histogram_puts_each_value_at_the_least_bound_that_holds_it() -> None:
    h = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 9):
        h.observe(value)
    h.observe(2, times=10)
    assert h.counts == [2, 11, 1, 1]
    assert h.total == 37


def test_the_times_of_a_sequence_are_told_apart() -> None:
    stats = Stats()
    stats.ask(1, 16, [7])
    stats.arrive(1, 10.0)
    stats.step([1], 5, [], began=13.0, now=14.0)  # a chunk of the prompt
    stats.step([1], 2, [1], began=14.0, now=16.0)
    stats.step([1], 1, [1], began=16.0, now=17.0)
    stats.step([2], 1, [], began=17.0, now=18.0)  # it had no turn
    stats.step([1], 1, [1], began=18.0, now=20.0)
    stats.finish(1, "stop", 21.0)
    assert [h.total for h in (stats.queue_s, stats.prefill_s, stats.decode_s, stats.inference_s)] == [3, 3, 4, 7]
    assert [h.total for h in (stats.first_token_s, stats.inter_token_s, stats.per_token_s)] == [6, 4, 2]
    assert (stats.end_to_end_s.total, sum(stats.inter_token_s.counts)) == (11, 2)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.generation_len.total) == (7, 3, 3)
    assert (stats.step_tokens.total, sum(stats.step_s.counts), stats.slowest_step_s) == (10, 5, 2.0)
    assert stats.finished == {"stop": 1}


def test_tokens_of_consecutive_steps_are_counted_each() -> None:
    stats = Stats()
    for i in range(32):
        stats.arrive(i, 0.0)
    for now in (1.0, 2.0, 3.5):
        stats.step(range(32), 32, range(32), began=now - 1, now=now)
    assert sum(stats.inter_token_s.counts) == 64
    assert stats.inter_token_s.total == 32 * 2.5


def test_a_sequence_that_never_ran_ends_without_times_and_once() -> None:
    stats = Stats()
    stats.arrive(1, 0.0)
    for _ in range(2):
        stats.finish(1, "abort", 5.0)
    assert stats.finished == {"abort": 1}
    assert not sum(stats.queue_s.counts)
    assert not stats.num_alive
    stats.step([2], 1, [], began=5.0, now=6.0)
