"""The scheduler's rules, each as a sentence, on integers alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaseq_api.core import SamplingParams, Sequence, Status
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler, Step


def seq(
    i: int, prompt_len: int, max_tokens: int = 10, leader: Sequence | None = None, group: int = 0, head: int = 0
) -> Sequence:
    """Its first `head` tokens are everybody's, the others its own (or its leader's)."""
    return Sequence(
        seq_id=i,
        group=group,
        prompt_len=prompt_len,
        token_ids=leader.token_ids[:prompt_len]
        if leader
        else [p if p < head else 1000 * (1 + i) + p for p in range(prompt_len)],
        params=SamplingParams(max_tokens=max_tokens),
        max_len=prompt_len + max_tokens,
        leader=leader,
    )


def scheduler(
    *, num_blocks: int = 100, block_size: int = 4, tokens: int = 16, size: int = 8, prefix_cache: bool = True
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, max_batch_tokens=tokens, max_batch_size=size, prefix_cache=prefix_cache)


def run(s: Scheduler, model: Callable[[Step], None] = lambda step: None) -> Step:
    """One step; every sequence whose prompt is complete samples a token, and finishes at its length."""
    step = s.schedule()
    assert step is not None
    model(step)
    sampled = {
        q.seq_id: 7
        for q, item in zip(step.sequences, step.batch.items, strict=True)
        if item.context_len == len(q.token_ids)
    }
    s.apply(step, sampled)
    for q in step.sequences:
        if len(q.token_ids) >= q.max_len:
            s.finish(q)
    return step


def fed(step: Step) -> dict[int, int]:
    return {q.seq_id: i.num_tokens for q, i in zip(step.sequences, step.batch.items, strict=True)}


def test_nothing_to_do_is_no_step() -> None:
    assert scheduler().schedule() is None


def test_a_new_request_joins_at_the_next_step() -> None:
    s = scheduler()
    s.add(seq(0, 3))
    run(s)
    s.add(seq(1, 5))
    assert fed(run(s)) == {0: 1, 1: 5}


def test_a_long_prompt_is_fed_in_chunks_and_others_decode_meanwhile() -> None:
    s = scheduler(tokens=8)
    s.add(seq(0, 2))
    run(s)
    s.add(seq(1, 18))
    assert [fed(run(s)) for _ in range(4)] == [{0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 4}, {0: 1, 1: 1}]


def test_only_a_complete_prompt_asks_for_logits() -> None:
    s = scheduler(tokens=8)
    s.add(seq(0, 12))
    first, second = run(s), run(s)
    assert [first.batch.items[0].num_logits, second.batch.items[0].num_logits] == [0, 1]


def test_a_prompt_to_be_scored_asks_for_all_its_logits_and_later_tokens_for_one() -> None:
    s = scheduler(tokens=8)
    q = seq(0, 12)
    q.scores_prompt = True
    s.add(q)
    assert [run(s).batch.items[0].num_logits for _ in range(3)] == [8, 4, 1]


def test_no_more_run_at_once_than_allowed() -> None:
    s = scheduler(size=2)
    for i in range(4):
        s.add(seq(i, 2))
    assert set(fed(run(s))) == {0, 1}
    assert (s.num_running, s.num_waiting) == (2, 2)


def test_requests_take_turns_so_that_a_short_one_does_not_wait_for_a_strangers_batch() -> None:
    s = scheduler(size=2)
    for i in range(10):
        s.add(seq(i, 2, max_tokens=3, group=1))
    run(s)
    s.add(seq(99, 2, max_tokens=1, group=2))
    while 99 not in (started := fed(run(s))):
        assert s.num_waiting > 1, "it came last"
    assert set(started) & {2, 3}


def of(tenant: str, i: int, *, weight: float = 1.0, priority: int = 0, prompt_len: int = 4) -> Sequence:
    """A request of its own, with a prompt of its own."""
    q = seq(i, prompt_len, max_tokens=1, group=i)
    q.tenant, q.weight, q.priority = tenant, weight, priority
    return q


def test_tenants_share_what_is_computed_by_their_weights() -> None:
    s = scheduler(tokens=4, size=1)
    for i in range(80):
        s.add(of("paying", i, weight=3))
        s.add(of("guest", 100 + i))
    served = [run(s).sequences[0].tenant for _ in range(80)]
    assert served.count("paying") in range(59, 62)


def test_a_tenant_that_sends_long_prompts_gets_fewer_turns() -> None:
    s = scheduler(tokens=16, size=1)
    for i in range(40):
        s.add(of("long", i, prompt_len=12))
        s.add(of("short", 100 + i, prompt_len=4))
    served = [run(s).sequences[0].tenant for _ in range(40)]
    assert served.count("short") in range(29, 32)


def test_a_thousand_requests_of_one_tenant_do_not_delay_the_first_of_another() -> None:
    s = scheduler(tokens=4, size=1)
    for i in range(1000):
        s.add(of("greedy", i))
    for _ in range(20):
        run(s)
    s.add(of("modest", 1000))
    assert "modest" in [run(s).sequences[0].tenant for _ in range(2)]


def test_the_lowest_priority_of_a_tenant_comes_first_but_not_before_another_tenants_turn() -> None:
    s = scheduler(tokens=4, size=1)
    for i, (tenant, priority) in enumerate((("a", 0), ("a", -5), ("b", 100), ("a", 5))):
        s.add(of(tenant, i, priority=priority))
    assert [run(s).sequences[0].seq_id for _ in range(4)] == [1, 2, 0, 3]


def test_a_full_pool_makes_the_request_wait() -> None:
    s = scheduler(num_blocks=5, block_size=4)
    s.add(seq(0, 12, max_tokens=4))
    s.add(seq(1, 9, max_tokens=2))
    while s.num_running or s.num_waiting:
        step = run(s)
        assert len(step.sequences) == 1
    s.check_idle()


def test_a_leaked_block_is_noticed_when_nothing_runs() -> None:
    s = scheduler(num_blocks=5, block_size=4)
    s.count_idle()
    held = s.pool.allocate(1)
    for check in (s.count_idle, s.check_idle):
        with pytest.raises(AssertionError):
            check()
    s.pool.free(held)
    s.count_idle()
    s.add(seq(0, 12, max_tokens=4))
    run(s)
    s.count_idle()  # what runs may hold some


def test_the_youngest_gives_way_and_its_tokens_are_kept() -> None:
    s = scheduler(num_blocks=4, block_size=4)
    old, young = seq(0, 7, max_tokens=9), seq(1, 7, max_tokens=9)
    s.add(old)
    s.add(young)
    run(s)
    run(s)
    assert fed(run(s)) == {0: 1}
    assert young.status is Status.WAITING
    assert (len(young.token_ids), young.num_cached, young.num_preemptions) == (9, 0, 1)
    while s.num_running or s.num_waiting:
        run(s)
    assert len(old.token_ids) == len(young.token_ids) == 16
    s.check_idle()


def test_later_samples_wait_for_the_first_and_share_its_full_blocks() -> None:
    s = scheduler(tokens=64)
    first = seq(0, 10)
    s.add(first)
    s.add(seq(1, 10, leader=first))
    s.add(seq(2, 3))
    assert fed(run(s)) == {0: 10, 2: 3}
    step = run(s)
    assert fed(step) == {0: 1, 2: 1, 1: 2}
    assert step.batch.items[2].block_ids[:2] == step.batch.items[0].block_ids[:2]
    assert step.batch.items[2].block_ids[2] != step.batch.items[0].block_ids[2]


def test_a_sample_whose_leader_is_cancelled_goes_alone() -> None:
    s = scheduler()
    first = seq(0, 10)
    second = seq(1, 10, leader=first)
    s.add(first)
    s.add(second)
    s.finish(first)
    assert fed(run(s)) == {1: 10}
    s.finish(second)
    s.check_idle()


def test_finishing_twice_is_harmless() -> None:
    s = scheduler()
    q = seq(0, 5)
    s.add(q)
    run(s)
    s.finish(q)
    s.finish(q)
    s.check_idle()


def answer(s: Scheduler, q: Sequence) -> list[dict[int, int]]:
    """Run one sequence to its end; what was fed, step by step."""
    s.add(q)
    steps = []
    while q.status is not Status.FINISHED:
        steps.append(fed(run(s)))
    return steps


def test_a_head_that_the_cache_has_is_not_computed_again() -> None:
    s = scheduler(tokens=64)
    answer(s, seq(0, 20, head=12))
    assert answer(s, seq(1, 20, head=12))[0] == {1: 8}
    assert (s.prefix_queries_tokens, s.prefix_hits_tokens) == (40, 12)
    s.check_idle()


def test_a_prompt_known_to_its_end_still_computes_a_token_for_its_logits() -> None:
    s = scheduler(tokens=64)
    answer(s, seq(0, 12, head=12))
    assert answer(s, seq(1, 12, head=12))[0] == {1: 4}
    assert answer(s, seq(2, 13, head=13))[0] == {2: 1}


def test_with_the_prefix_cache_off_all_is_computed() -> None:
    s = scheduler(tokens=64, prefix_cache=False)
    assert [answer(s, seq(i, 20, head=20))[0] for i in range(2)] == [{0: 20}, {1: 20}]
    assert (s.prefix_queries_tokens, s.prefix_hits_tokens, s.pool.num_cached) == (0, 0, 0)


def test_the_same_tokens_behind_another_head_are_not_taken_for_the_same() -> None:
    s = scheduler(tokens=64)
    answer(s, seq(0, 20))
    q = seq(1, 20)
    q.token_ids[4:] = range(4, 20)
    r = seq(2, 16)
    r.token_ids[:] = q.token_ids[4:]
    assert (answer(s, q)[0], answer(s, r)[0]) == ({1: 20}, {2: 16})


def test_a_chats_next_turn_computes_the_last_answer_as_a_prompt_once() -> None:
    s = scheduler(tokens=64)
    first = seq(0, 10, max_tokens=11)
    answer(s, first)
    second, third = seq(1, 25), seq(2, 29)
    second.token_ids[:21] = first.token_ids
    third.token_ids[:25] = second.token_ids[:25]
    assert answer(s, second)[0] == {1: 17}  # two blocks of the first prompt are found
    assert answer(s, third)[0] == {2: 5}


def test_of_requests_that_come_together_one_computes_the_head_and_the_others_wait_for_it() -> None:
    s = scheduler(tokens=64)
    for i in range(3):
        s.add(seq(i, 20, head=16, group=i))
    assert [fed(run(s)) for _ in range(2)] == [{0: 20}, {0: 1, 1: 4, 2: 4}]


def test_nobody_waits_for_a_head_that_is_the_smaller_part_of_its_prompt() -> None:
    s = scheduler(tokens=64)
    s.add(seq(0, 12, head=8))
    s.add(seq(1, 20, head=8))
    assert fed(run(s)) == {0: 12, 1: 20}
    step = run(s)
    assert step.batch.items[0].block_ids[:2] == step.batch.items[1].block_ids[:2], "both keep their own"


def test_who_waits_for_a_head_goes_on_alone_when_the_other_is_cancelled() -> None:
    s = scheduler(tokens=8)
    first, second = seq(0, 20, head=20), seq(1, 20, head=20)
    s.add(first)
    s.add(second)
    assert fed(run(s)) == {0: 8}
    s.finish(first)
    assert fed(run(s)) == {1: 8}, "from what the first one left"
    assert second.block_ids[:2] == [0, 1]
    s.finish(second)
    s.check_idle()


def test_a_prompt_to_be_scored_computes_all_and_others_find_its_blocks() -> None:
    s = scheduler(tokens=64)
    answer(s, seq(0, 20, head=20))
    scored = seq(1, 20, head=20)
    scored.scores_prompt = True
    assert answer(s, scored)[0] == {1: 20}
    other = seq(2, 30, head=24)
    other.scores_prompt = True
    answer(s, other)
    assert answer(s, seq(3, 30, head=24))[0] == {3: 6}
    s.check_idle()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    s = scheduler(num_blocks=6, block_size=4, tokens=64)
    old, young = seq(0, 7, max_tokens=9), seq(1, 7, max_tokens=9)
    s.add(old)
    s.add(young)
    while not young.num_preemptions:
        run(s)
    s.finish(old)
    missing = len(young.token_ids) - 8
    assert fed(run(s)) == {1: missing}


def test_a_head_is_computed_again_when_its_blocks_were_needed_for_others() -> None:
    s = scheduler(num_blocks=6, block_size=4, tokens=64)
    answer(s, seq(0, 12, max_tokens=1, head=12))
    answer(s, seq(1, 20, max_tokens=1))
    assert answer(s, seq(2, 12, max_tokens=1, head=12))[0] == {2: 8}, "the first block outlived those behind it"


def test_values_that_are_not_numbers_are_never_found_again() -> None:
    s = scheduler(tokens=64)
    bad = seq(0, 20, head=20)
    s.add(bad)
    run(s)
    s.discard(bad)
    s.check_idle()
    assert answer(s, seq(1, 20, head=20))[0] == {1: 20}


class Contents:
    """What each slot of the cache would hold: every token of a context, up to the slot's own."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def run(self, step: Step) -> None:
        """Write what a step feeds, and prove that it reads what its own tokens would have written."""
        written: set[tuple[int, int]] = set()
        texts = [list(q.token_ids) for q in step.sequences]
        for item, text in zip(step.batch.items, texts, strict=True):
            assert item.token_ids == text[item.start : item.context_len]
            assert len(item.block_ids) == -(-item.context_len // 4)
            for p in range(item.start, item.context_len):
                slot = (item.block_ids[p // 4], p % 4)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self._slots[slot] = text[: p + 1]
        for item, text in zip(step.batch.items, texts, strict=True):
            for p in range(item.context_len):
                assert self._slots[item.block_ids[p // 4], p % 4] == text[: p + 1], "a block in use was overwritten"


@settings(max_examples=400, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.sampled_from([0, 0, 6, 17, 30])),
        min_size=1,
        max_size=10,
    ),
    num_blocks=st.integers(11, 30),
    tokens=st.integers(1, 40),
    size=st.integers(1, 6),
    cancel=st.dictionaries(st.integers(0, 40), st.integers(0, 29), max_size=5),
    late=st.integers(0, 10),
    scores=st.sets(st.integers(0, 29), max_size=3),
    prefix_cache=st.booleans(),
)
def test_every_sequence_ends_and_reads_its_own_tokens_whatever_the_pool_and_budget(
    requests: list[tuple[int, int, int, int]],
    num_blocks: int,
    tokens: int,
    size: int,
    cancel: dict[int, int],
    late: int,
    scores: set[int],
    prefix_cache: bool,
) -> None:
    s = scheduler(num_blocks=num_blocks, tokens=tokens, size=size, prefix_cache=prefix_cache)
    everyone: list[Sequence] = []
    for group, (prompt_len, max_tokens, samples, head) in enumerate(requests):
        leader = None
        for _ in range(samples):
            q = seq(len(everyone), prompt_len, max_tokens, leader, group, head)
            q.scores_prompt = leader is None and q.seq_id in scores
            leader = leader or q
            everyone.append(q)
    contents = Contents()
    coming = list(everyone)
    for count in range(5000):
        if coming and count >= late:  # some join while others run, and find what these left
            s.add(coming.pop(0))
        if cancel.get(count, len(everyone)) < len(everyone) - len(coming):
            s.finish(everyone[cancel[count]])
        if not s.num_running and not s.num_waiting and not coming:
            break
        if not s.num_running and not s.num_waiting:
            continue
        step = run(s, contents.run)
        assert step.batch.num_tokens <= tokens
        assert len(step.sequences) <= size
    assert all(q.status is Status.FINISHED for q in everyone)
    s.check_idle()
