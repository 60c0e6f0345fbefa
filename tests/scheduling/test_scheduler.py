"""The scheduler's rules, each as a sentence, on integers alone."""

from __future__ import annotations

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


def run(s: Scheduler) -> Step:
    """One step; every sequence whose prompt is complete samples a token, and finishes at its length."""
    step = s.schedule()
    assert step is not None
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


def test_a_full_pool_makes_the_request_wait() -> None:
    s = scheduler(num_blocks=5, block_size=4)
    s.add(seq(0, 12, max_tokens=4))
    s.add(seq(1, 9, max_tokens=2))
    while s.num_running or s.num_waiting:
        step = run(s)
        assert len(step.sequences) == 1
    s.check_idle()


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


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=8),
    num_blocks=st.integers(11, 30),
    tokens=st.integers(1, 40),
    size=st.integers(1, 6),
    cancel=st.sets(st.integers(0, 20), max_size=4),
)
def test_every_sequence_ends_whatever_the_pool_and_budget(
    requests: list[tuple[int, int, int]], num_blocks: int, tokens: int, size: int, cancel: set[int]
) -> None:
    s = scheduler(num_blocks=num_blocks, tokens=tokens, size=size)
    everyone: list[Sequence] = []
    for prompt_len, max_tokens, samples in requests:
        leader = None
        for _ in range(samples):
            q = seq(len(everyone), prompt_len, max_tokens, leader)
            leader = leader or q
            everyone.append(q)
            s.add(q)
    for count in range(5000):
        if count in cancel and count < len(everyone):
            s.finish(everyone[count])
        if not s.num_running and not s.num_waiting:
            break
        step = run(s)
        assert step.batch.num_tokens <= tokens
        assert len(step.sequences) <= size
        written: set[tuple[int, int]] = set()
        for item in step.batch.items:
            assert len(item.block_ids) == -(-item.context_len // 4)
            slots = {(item.block_ids[p // 4], p % 4) for p in range(item.start, item.context_len)}
            assert not written & slots, "two sequences write one slot"
            written |= slots
    assert all(q.status is Status.FINISHED for q in everyone)
    s.check_idle()
