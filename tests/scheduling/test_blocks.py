"""The pool gives every block to those who hold it, and gets every block back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaseq_api.scheduling.blocks import BlockPool, block_key


def test_the_lowest_free_blocks_go_first() -> None:
    pool = BlockPool(6, 16)
    a, b = pool.allocate(2), pool.allocate(2)
    pool.free(a)
    assert (a, b, pool.allocate(3)) == ([0, 1], [2, 3], [0, 1, 4])


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 2
    pool.check_idle()


def test_the_idle_check_sees_a_leak() -> None:
    pool = BlockPool(2, 16)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_idle()


def test_a_block_freed_twice_is_noticed() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError):
        pool.free(blocks)


KEYS = [block_key(b"", [i], 1) for i in range(9)]


def kept(pool: BlockPool, *keys: bytes) -> list[int]:
    """Blocks with these keys that somebody holds."""
    return [pool.keep(block, key) for block, key in zip(pool.allocate(len(keys)), keys, strict=True)]


def test_a_key_says_the_tokens_which_were_generated_their_borders_and_all_before_them() -> None:
    keys = [
        block_key(b"", [1, 2], 2),
        block_key(b"", [1, 2], 1),
        block_key(b"", [1, 2], 0),
        block_key(b"", [2, 1], 2),
        block_key(b"", [12], 1),
        block_key(block_key(b"", [1, 2], 2), [1, 2], 2),
        block_key(block_key(b"", [1, 2], 1), [1, 2], 2),
        block_key(block_key(b"", [2, 1], 2), [1, 2], 2),
    ]
    assert len(set(keys)) == 8
    assert block_key(b"", [1, 2], 2) == keys[0]


def test_a_block_with_a_key_is_found_until_it_is_needed() -> None:
    pool = BlockPool(3, 16)
    blocks = kept(pool, *KEYS[:2])
    pool.free(blocks)
    assert (pool.num_free, pool.num_cached, pool.find(KEYS[:3])) == (3, 2, blocks)
    assert pool.allocate(1) == [2], "a block without a key goes first"
    assert pool.allocate(1) == [1], "then the one that continues the other"
    assert pool.find(KEYS[:2]) == [0]
    assert pool.allocate(1) == [0]
    assert pool.find(KEYS[:2]) == []


def test_the_least_recently_used_go_first_and_none_before_those_that_continue_it() -> None:
    pool = BlockPool(4, 16)
    a, b = kept(pool, *KEYS[:2]), kept(pool, *KEYS[2:4])
    pool.free(a)
    pool.free(b)
    pool.share(pool.find(KEYS[:2]))
    pool.free(a)  # used again: now the younger
    assert [pool.allocate(1)[0] for _ in range(4)] == [3, 2, 1, 0]


def test_a_found_block_that_is_shared_is_not_given_away() -> None:
    pool = BlockPool(2, 16)
    pool.free(kept(pool, *KEYS[:2]))
    found = pool.find(KEYS[:1])
    assert pool.num_free_beside(found) == 1
    pool.share(found)
    assert pool.allocate(1) == [1]
    assert pool.num_free == 0


def test_of_two_blocks_with_one_content_one_is_kept() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.allocate(1), pool.allocate(1)
    assert [pool.keep(first[0], KEYS[0]), pool.keep(second[0], KEYS[0])] == [0, 0]
    assert pool.num_free == 3
    pool.free([0])
    pool.free([0])
    pool.check_idle()


def test_what_is_forgotten_is_not_found_though_somebody_holds_it() -> None:
    pool = BlockPool(3, 16)
    blocks = kept(pool, *KEYS[:2])
    pool.free(blocks[1:])
    pool.forget(KEYS[:3])
    assert (pool.find(KEYS), pool.num_free, pool.num_cached) == ([], 2, 0)
    pool.free(blocks[:1])
    pool.check_idle()


@given(st.lists(st.tuples(st.sampled_from("afskrx"), st.integers(0, 8)), max_size=80))
def test_no_order_of_operations_loses_or_doubles_a_block(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(12, 4)
    held: list[list[int]] = []
    for what, n in operations:
        if what == "a" and n <= pool.num_free:
            held.append(pool.allocate(n))
        elif what == "f" and held:
            pool.free(held.pop(n % len(held)))
        elif what == "s" and held:
            pool.share(held[n % len(held)])
            held.append(list(held[n % len(held)]))
        elif what == "k" and n <= pool.num_free:
            held.append(kept(pool, *KEYS[:n]))
        elif what == "r":
            found = pool.find(KEYS[:n])
            pool.share(found)
            held.append(found)
        elif what == "x":
            pool.forget(KEYS[n:])
        assert pool.num_free == 12 - len({b for blocks in held for b in blocks})
    for blocks in held:
        pool.free(blocks)
    pool.check_idle()
