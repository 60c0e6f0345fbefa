"""A pickle like one already read is what reading it all would say, with the same objects where they are the same."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaseq_api.checkpoint.alike import Pattern
from metaseq_api.checkpoint.inert import plain
from metaseq_api.checkpoint.unpickle import read_pickle


def shard(rank: int = 0, padding: int = 0, seconds: float = 1.5, **more: Any) -> dict[str, Any]:
    return {
        "cfg": {"rank": rank, "model": Namespace(layers=2, rank=rank), "sizes": [1, padding, 3]},
        "model": OrderedDict(a="first", b="second"),
        "extra_state": {"seconds": seconds, "names": ["x", "y"]},
        "metadata": [{"params": {"flat": {"numels": [4, 5], "padding": padding}}}],
        **more,
    }


def dumped(tree: Any) -> bytes:
    return pickle.dumps(tree, protocol=2)


@pytest.mark.parametrize(
    "other",
    [
        shard(),
        shard(rank=1),
        shard(rank=123, padding=200, seconds=-2.0),
        shard(rank=70_000, padding=256),
        shard(rank=-1, padding=65_536, seconds=7.25),
    ],
)
def test_numbers_of_any_width_may_differ(other: dict[str, Any]) -> None:
    pattern = Pattern(dumped(shard()))
    before = plain(copy.deepcopy(pattern.tree))
    got = pattern.read(dumped(other))
    assert plain(got) == plain(read_pickle(dumped(other)))
    assert plain(pattern.tree) == before


def test_what_is_the_same_is_shared() -> None:
    pattern = Pattern(dumped(shard()))
    assert pattern.read(dumped(shard())) is pattern.tree
    got = pattern.read(dumped(shard(rank=9)))
    assert got["metadata"] is pattern.tree["metadata"]
    assert got["extra_state"] is pattern.tree["extra_state"]
    assert got["cfg"] is not pattern.tree["cfg"]


def test_a_list_that_two_places_hold_is_not_changed_in_one() -> None:
    both = [1, 2]
    pattern = Pattern(dumped({"a": both, "b": both}))
    other = [1, 3]
    assert pattern.read(dumped({"a": other, "b": other})) is None


@pytest.mark.parametrize(
    "other",
    [
        shard(more=1),
        shard() | {"model": OrderedDict(a="first", c="second")},
        shard() | {"cfg": {"rank": "0"}},
        shard() | {"extra_state": {"seconds": 1.5, "names": ["x", "z"]}},
        {},
    ],
)
def test_more_than_numbers_is_left_to_the_reader_of_whole_pickles(other: dict[str, Any]) -> None:
    assert Pattern(dumped(shard())).read(dumped(other)) is None


def test_a_number_that_says_where_something_is_may_not_differ() -> None:
    pattern = Pattern(dumped({"shape": (3, 4), 5: "key"}))
    assert pattern.read(dumped({"shape": (3, 5), 5: "key"})) is None
    assert pattern.read(dumped({"shape": (3, 4), 6: "key"})) is None


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_pickle_is_never_read_as_another_than_it_is(data: st.DataObject) -> None:
    whole = dumped(shard())
    at = data.draw(st.integers(0, len(whole) - 1))
    taken = data.draw(st.integers(0, 3))
    mutated = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + taken :]
    got = Pattern(whole).read(mutated)
    if got is not None:
        assert repr(plain(got)) == repr(plain(read_pickle(mutated)))
