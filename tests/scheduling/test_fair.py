"""Between tenants tokens go by weight, whatever each asks for; nobody saves up credit, nobody starves."""

from __future__ import annotations

from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaseq_api.scheduling.fair import FairQueue

T = TypeVar("T")


class Queue(FairQueue[T]):
    """With the two words that tell what a turn is."""

    def peek(self) -> T | None:
        return next((item for items in self.turns() for item in items), None)

    def pop(self) -> T | None:
        item = self.peek()
        if item is not None:
            self.take_turn(item)
            self.remove(item)
        return item


WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.5, 8), min_size=2, max_size=6)


@given(weights=WEIGHTS, data=st.data())
def test_shares_converge_to_the_weights_whatever_a_request_costs(
    weights: dict[str, float], data: st.DataObject
) -> None:
    costs = {t: data.draw(st.integers(1, 200), label=f"cost of {t}") for t in weights}
    queue: Queue[tuple[str, int]] = Queue()
    got = dict.fromkeys(weights, 0.0)
    for tenant, weight in weights.items():
        for i in range(2):
            queue.push((tenant, i), tenant=tenant, weight=weight)
    for step in range(600):
        item = queue.pop()
        assert item is not None
        tenant = item[0]
        got[tenant] += costs[tenant]
        queue.charge(tenant, costs[tenant])
        queue.push((tenant, step + 2), tenant=tenant, weight=weights[tenant])
        # at every moment, not only in the end: no two differ by more than one request of each
        served = {t: got[t] / weights[t] for t in weights}
        bound = max(costs[t] / weights[t] for t in weights)
        assert max(served.values()) - min(served.values()) <= bound + 1e-6


def test_alpas_three_classes_share_as_their_weights_say() -> None:
    weights = {"web": 300.0, "key": 10.0, "anonymous": 1.0}
    queue: Queue[tuple[str, int]] = Queue()
    got = dict.fromkeys(weights, 0)
    for tenant, weight in weights.items():
        queue.push((tenant, 0), tenant=tenant, weight=weight)
    for step in range(31100):
        item = queue.pop()
        assert item is not None
        got[item[0]] += 1
        queue.charge(item[0], 1)
        queue.push((item[0], step + 1), tenant=item[0], weight=weights[item[0]])
    assert got == {
        "web": pytest.approx(30000, abs=2),
        "key": pytest.approx(1000, abs=2),
        "anonymous": pytest.approx(100, abs=2),
    }


def test_a_thousand_requests_of_one_do_not_delay_the_first_of_another() -> None:
    queue: Queue[str] = Queue()
    for i in range(1000):
        queue.push(f"many{i}", tenant="greedy")
    for _ in range(50):
        queue.pop()
        queue.charge("greedy", 100)
    queue.push("mine", tenant="modest")
    taken = [queue.pop(), queue.pop()]
    assert "mine" in taken


def test_a_newcomer_begins_level_and_does_not_shut_the_others_out() -> None:
    queue: Queue[str] = Queue()
    for i in range(200):
        queue.push(f"old{i}", tenant="old")
    for _ in range(100):
        queue.pop()
        queue.charge("old", 100)
    for i in range(50):
        queue.push(f"new{i}", tenant="new")
    first = []
    for _ in range(20):
        item = queue.pop()
        assert item is not None
        queue.charge(item[:3], 100)
        first.append(item[:3])
    assert first.count("new") in (10, 11)


def test_who_was_away_has_saved_up_nothing() -> None:
    queue: Queue[str] = Queue()
    queue.push("b-early", tenant="b")
    assert queue.pop() == "b-early"
    queue.charge("b", 1)
    for i in range(100):  # a works alone for long
        queue.push(f"a{i}", tenant="a")
        queue.pop()
        queue.charge("a", 1000)
    for i in range(20):
        queue.push(f"a-now{i}", tenant="a")
        queue.push(f"b-now{i}", tenant="b")
    turns = []
    for _ in range(20):
        item = queue.pop()
        assert item is not None
        queue.charge(item[0], 1000)
        turns.append(item[0])
    assert turns.count("b") in (10, 11)


def test_one_request_after_another_gets_its_weight_as_many_at_once_do() -> None:
    queue: Queue[str] = Queue()
    got = {"loop": 0, "many": 0}
    for i in range(1000):
        queue.push(f"many{i}", tenant="many", weight=1)
    queue.push("loop", tenant="loop", weight=3)
    for i in range(400):
        item = queue.pop()
        assert item is not None
        got[item[:4]] += 1
        queue.charge(item[:4], 50)
        if item.startswith("loop"):
            queue.push(f"loop{i}", tenant="loop", weight=3)
    assert got["loop"] in range(298, 303)


def test_leaving_and_coming_back_does_not_wipe_out_what_was_served() -> None:
    queue: Queue[str] = Queue()
    queue.push("rest", tenant="steady")
    queue.push("x0", tenant="hopper")
    for i in range(10):
        queue.remove(f"x{i}")
        queue.charge("hopper", 50)
        queue.push(f"x{i + 1}", tenant="hopper")
    assert queue.pop() == "rest"


def test_within_a_tenant_the_lowest_priority_comes_first_and_equals_in_order() -> None:
    queue: Queue[str] = Queue()
    for name, priority in (("c", 0), ("d", 0), ("e", 5), ("a", -5), ("b", -5)):
        queue.push(name, priority=priority)
    assert [queue.pop() for _ in range(6)] == ["a", "b", "c", "d", "e", None]


def test_priority_does_not_reach_beyond_its_tenant() -> None:
    queue: Queue[str] = Queue()
    queue.push("pushy", tenant="a", priority=-100)
    queue.charge("a", 1000)
    queue.push("meek", tenant="b", priority=100)
    queue.charge("b", 1)
    assert queue.pop() == "meek"


def test_peek_takes_nothing_and_remove_takes_from_anywhere() -> None:
    queue: Queue[str] = Queue()
    for name in "abc":
        queue.push(name)
    assert (queue.peek(), queue.peek(), len(queue)) == ("a", "a", 3)
    assert queue.remove("b")
    assert not queue.remove("b")
    assert "b" not in queue
    assert [queue.pop(), queue.pop(), queue.pop()] == ["a", "c", None]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(-2, 2)), max_size=60))
def test_it_says_what_a_search_through_everything_would_say(script: list[tuple[str, int, int]]) -> None:
    """Against the rule written plainly, over any order of arrivals, removals, turns and charges."""
    queue: Queue[int] = Queue()
    waiting: dict[int, tuple[str, int]] = {}
    served: dict[str, float] = {}
    order: dict[str, int] = {}
    virtual = 0.0
    for number, (tenant, what, priority) in enumerate(script):
        if what < 4:
            if tenant not in {t for t, _ in waiting.values()}:
                served[tenant] = max(served.get(tenant, 0.0), virtual)
            order.setdefault(tenant, number)
            waiting[number] = (tenant, priority)
            queue.push(number, tenant=tenant, priority=priority)
        elif what < 6 and waiting:
            gone = sorted(waiting)[what % len(waiting)]
            del waiting[gone]
            assert queue.remove(gone)
        elif what < 8:
            wanted = min(
                waiting, key=lambda n: (served[waiting[n][0]], order[waiting[n][0]], waiting[n][1], n), default=None
            )
            assert queue.pop() == wanted
            if wanted is not None:
                assert served[waiting[wanted][0]] >= virtual, "the virtual time never falls"
                virtual = served[waiting.pop(wanted)[0]]
        else:
            queue.charge(tenant, what)
            if tenant in served:
                served[tenant] += what
    assert len(queue) == len(waiting)


def test_nothing_is_kept_of_what_was_taken_out() -> None:
    queue: Queue[int] = Queue()
    queue.push(-1, priority=-1)
    for i in range(1000):
        queue.push(i)
        queue.remove(i)
    assert len(queue) == 1
    assert queue._tenants[""].waiting == {-1: {-1: None}}
