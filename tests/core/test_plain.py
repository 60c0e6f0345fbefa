"""Nouns cross a line unchanged, and nothing else does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest
from support.processes import until

from metaseq_api.core import (
    Completion,
    FinishReason,
    Health,
    RankedToken,
    Request,
    SamplingParams,
    Stats,
    TokenLogprobs,
)
from metaseq_api.core.line import Line
from metaseq_api.core.plain import error_from_plain, error_to_plain, from_plain, to_plain
from metaseq_api.errors import EngineStopped, MetaseqApiError, NotBegun, Overloaded, RequestError

LOGPROBS = TokenLogprobs(
    tokens=("a", "bytes:\\xe2"), token_logprobs=(None, -0.1), top_logprobs=(None, {"b": -3e-17}), text_offset=(0, 1)
)
COMPLETION = Completion(
    prompt_index=1,
    sample_index=2,
    text="\u20ac\n\ud800",
    token_ids=(4, 5),
    finish_reason=FinishReason.LENGTH,
    num_prompt_tokens=3,
    num_tokens=2,
    logprobs=LOGPROBS,
    mean_logprob=float("-inf"),
    first_top=((4, -0.5),),
    prompt_logprobs=(None, {7: RankedToken("x", -1.25, 3)}),
)
NOUNS = [
    Request(request_id="r", prompts=((1, 2), ())),
    Request(
        request_id="r",
        prompts=((4,),),
        params=SamplingParams(stop=("a", "b"), logit_bias=((5, -100.0),), seed=-(2**63), best_of=3, n=2),
        user="u",
        tenant="t",
        weight=2.5,
        deadline_s=1e9,
    ),
    COMPLETION,
    Health(
        alive=True, reason="", num_running=1, num_waiting=2, num_free_blocks=3, num_blocks=4, rank_age_s=(0.5, 1e300)
    ),
]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda n: type(n).__name__)
def test_a_noun_comes_back_equal_and_of_the_same_types(noun: object) -> None:
    back = from_plain(type(noun), json.loads(json.dumps(to_plain(noun))))
    assert back == noun
    assert repr(back) == repr(noun)


def test_what_is_counted_comes_back() -> None:
    stats = Stats(prompt_tokens=7)
    stats.step_s.observe(0.25, 3)
    stats.finished["stop"] += 2
    back = from_plain(Stats, json.loads(json.dumps(to_plain(stats))))
    assert (back.prompt_tokens, back.step_s, back.finished) == (7, stats.step_s, stats.finished)
    assert back.finished["abort"] == 0


@pytest.mark.parametrize(
    "error",
    [
        MetaseqApiError("ours"),
        NotBegun("stopping"),
        Overloaded("full", retry_after_s=2.5),
        RequestError("wrong", param="n", code="cancelled"),
    ],
)
def test_an_error_comes_back_as_it_was(error: MetaseqApiError) -> None:
    back = error_from_plain(json.loads(json.dumps(error_to_plain(error))))
    assert type(back) is type(error)
    assert (str(back), back.code, back.status) == (str(error), error.code, error.status)
    assert vars(back) == vars(error) | {"code": error.code} if isinstance(error, RequestError) else not vars(back)


def test_no_class_but_an_error_is_made_of_a_name() -> None:
    with pytest.raises(AssertionError):
        error_from_plain({"class": "annotations", "message": ""})
    assert isinstance(error_from_plain({"class": "EngineStopped", "message": ""}), EngineStopped)


@pytest.fixture
def lines() -> Iterator[tuple[Line, Line]]:
    a, b = socket.socketpair()
    both = Line(a), Line(b)
    yield both
    for line in both:
        line.hang_up()
        assert list(line.messages()) == []


def test_messages_arrive_whole_and_in_order_whatever_their_size(lines: tuple[Line, Line]) -> None:
    here, there = lines
    texts = ["", "x" * (1 << 20), "\u20ac", "end"]
    sender = threading.Thread(target=lambda: [here.send("text", t) for t in texts])
    sender.start()
    heard = there.messages()
    assert [next(heard) for _ in texts] == [["text", t] for t in texts]
    sender.join()


def test_who_hangs_up_is_heard_of_by_both_and_nobody_is_told_any_more(lines: tuple[Line, Line]) -> None:
    here, there = lines
    there.hang_up()
    assert list(here.messages()) == []
    here.send("anything")  # to nobody, and nobody waits


def test_who_dies_with_something_unread_has_gone_like_any_other(lines: tuple[Line, Line]) -> None:
    here, there = lines
    here.send("unread")
    until(lambda: not here._out.qsize(), "it to be sent")
    there._sock.close()
    assert list(here.messages()) == []


def test_who_sends_does_not_wait_for_one_that_does_not_read(lines: tuple[Line, Line]) -> None:
    here, there = lines
    for _ in range(100):
        here.send("x" * 100_000)
    heard = there.messages()
    assert all(len(next(heard)[0]) == 100_000 for _ in range(100))
