"""The pool gives every block to those who hold it, and gets every block back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaseq_api.scheduling.blocks import BlockPool


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


@given(st.lists(st.tuples(st.sampled_from("afs"), st.integers(0, 4)), max_size=60))
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
        assert pool.num_free == 12 - len({b for blocks in held for b in blocks})
    for blocks in held:
        pool.free(blocks)
    pool.check_idle()
