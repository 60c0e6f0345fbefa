"""docs/fields.md holds over HTTP, field by field: what it takes and what it refuses by name, and that each field does
something: two answers that differ by it alone differ as the page says. A field without an entry here fails."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from metaseq_api.server import schema

if TYPE_CHECKING:
    from clients.conftest import Running

WINDOW, VOCAB = 96, 272
IDS = [5, 6, 7]
GREEDY = {"prompt": IDS, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 0}
SEEDED = GREEDY | {"temperature": 1, "seed": 11}
Body = dict[str, Any]
Answer = dict[str, Any]


def post(running: Running, body: Body) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{running.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = answer.read().decode()
            return answer.status, said if "event-stream" in answer.headers["Content-Type"] else json.loads(said)
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.load(e)["error"]


def texts(answer: Answer) -> list[str]:
    return [c["text"] for c in answer["choices"]]


def drawn(answer: Answer) -> list[str]:
    """The tokens of the first choice."""
    tokens: list[str] = answer["choices"][0]["logprobs"]["tokens"]
    return tokens


# field -> values that are taken, values that are refused by its name ("here" of the page)
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["x", None], [1]),
    "prompt": (["", "a", [5], ["a", ""], [[5], [6, 7]]], [None, [], [[]], [-1], [VOCAB], 5, {}, [None], ["a", 5]]),
    "suffix": (["", None], ["x", 1]),
    "max_tokens": ([1, WINDOW - len(IDS), 16.0, None], [0, -1, WINDOW - len(IDS) + 1, 1.5, "4", True]),
    "min_tokens": ([0, 12], [-1, 13, "1"]),
    "temperature": ([0, 0.04, 100], [-0.1, 100.1, "1", True]),
    "top_p": ([0, 0.05, 1], [-0.1, 1.1, "1"]),
    "top_k": ([-1, 0, 1, 10**9], [-2, 1.5]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "n": ([1, 8], [0, 9, -1]),
    "best_of": ([1, 8, None], [0, 9]),
    "seed": ([0, -(2**63), 2**63 - 1], [2**63, 0.5, "1"]),
    "stop": (["a", [], ["a"] * 64, None], ["", [""], ["a"] * 65, 5, "a" * 1025]),
    "stop_token_ids": ([[], [5] * 128], [[VOCAB], [-1], [5] * 129, 5, ["a"]]),
    "include_stop_str_in_output": ([True, False], [1, "true"]),
    "ignore_eos": ([True, False], [1]),
    "echo": ([True, False], [1, "true"]),
    "logprobs": ([0, 100, None], [-1, 101, True]),
    "prompt_logprobs": ([0, 100, None], [-1, 101, True]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "repetition_penalty": ([0.01, 1, 100], [0, -1, 101]),
    "logit_bias": (
        [{}, {"5": -100, "6": 100}],
        [{"5": 101}, {str(VOCAB): 1}, {"x": 1}, [5], {str(i): 0 for i in range(1025)}],
    ),
    "alpha_presence": ([0, 100], [-1, 101]),
    "alpha_frequency": ([0, 100], [-1, 101]),
    "alpha_presence_src": ([0, 100], [-1, 101]),
    "alpha_frequency_src": ([0, 100], [-1, 101]),
    "alpha_src_penalty_end_idx": ([-1, 0, 1, 500], [1.5, "1"]),
    "lambda_decay": ([-1, 0, 0.5, 1], [1.1, "1"]),
    "omega_bound": ([0, 1], [-0.1, 1.1]),
    "user": (["", "x" * 256], ["x" * 257, 1]),
    "stream": ([True, False, None], [1, "true"]),
    "stream_options": ([None], [{"include_usage": True}, {}, [], 1]),
    "timeout_ms": ([None, 1000, 86_400_000], ["x", 0, 86_400_001]),
    "priority": ([0, None, -100, 100], ["x", -101, 101]),
    "api_key": (["", None], ["x"]),
    "g-recaptcha-response": (["", None], ["x"]),
}


def test_every_field_has_its_ranges_and_its_effect_here() -> None:
    assert set(RANGES) == schema.COMPLETION_FIELDS
    assert set(EFFECTS) | SILENT == schema.COMPLETION_FIELDS
    assert not set(EFFECTS) & SILENT


@pytest.mark.parametrize("name", RANGES)
def test_a_field_takes_what_the_page_says_and_names_itself_where_it_does_not(name: str, service: Running) -> None:
    base = {"prompt": IDS, "max_tokens": 12}
    taken, refused = RANGES[name]
    for value in taken:
        status, said = post(service, base | {name: value})
        assert status == 200, (value, said)
    for value in refused:
        status, said = post(service, base | {name: value})
        assert (status, said["param"]) == (400, name), (value, said)


def differs(before: Answer, after: Answer) -> bool:
    return texts(before) != texts(after)


def ends_at(stop: str) -> Callable[[Answer, Answer], bool]:
    """The text is that before, up to the first such letter."""

    def check(before: Answer, after: Answer) -> bool:
        (whole,), (cut,) = texts(before), texts(after)
        return stop in whole and cut == whole[: whole.index(stop)] and after["choices"][0]["finish_reason"] == "stop"

    return check


def count(n: int) -> Callable[[Answer, Answer], bool]:
    return lambda _, after: after["usage"]["completion_tokens"] == n


def fewer_repeats(before: Answer, after: Answer) -> bool:
    return len(set(drawn(after))) > len(set(drawn(before)))


BIASED = GREEDY | {"logit_bias": {"37": 30}}
"""The letter B all the way, for penalties to end that."""
HOT = SEEDED | {"temperature": 3, "max_tokens": 40}
# field -> a body, what is changed in it, what is true of the answers before and after
EFFECTS: dict[str, tuple[Body, Body, Callable[[Answer, Answer], bool]]] = {
    "prompt": (GREEDY, {"prompt": [9, 8]}, differs),
    "max_tokens": (GREEDY, {"max_tokens": 5}, count(5)),
    "min_tokens": (
        GREEDY | {"ignore_eos": False, "logit_bias": {"2": 100}},
        {"min_tokens": 7},
        lambda before, after: (before["usage"]["completion_tokens"], after["usage"]["completion_tokens"]) == (0, 7),
    ),
    "temperature": (SEEDED, {"temperature": 0}, differs),
    "top_p": (HOT, {"top_p": 0.0}, lambda _, after: after["choices"][0]["finish_reason"] == "length"),
    "top_k": (HOT, {"top_k": 2}, differs),
    "min_p": (HOT, {"min_p": 0.9}, differs),
    "n": (SEEDED, {"n": 3}, lambda b, a: len(set(texts(a))) == 3 and texts(a)[0] == texts(b)[0]),
    "best_of": (SEEDED | {"n": 1}, {"best_of": 8}, differs),
    "seed": (SEEDED, {"seed": 12}, differs),
    "echo": (SEEDED | {"prompt": "the end"}, {"echo": True}, lambda b, a: texts(a)[0] == "the end" + texts(b)[0]),
    "logprobs": (
        GREEDY,
        {"logprobs": 3},
        lambda _, a: {len(t) for t in a["choices"][0]["logprobs"]["top_logprobs"]} == {3},
    ),
    "prompt_logprobs": (
        GREEDY,
        {"prompt_logprobs": 0},
        lambda _, a: len(a["choices"][0]["prompt_logprobs"]) == len(IDS),
    ),
    "ignore_eos": (GREEDY | {"logit_bias": {"2": 100}}, {"ignore_eos": False}, count(0)),
    "stop": (BIASED, {"stop": ["B"]}, ends_at("B")),
    "stop_token_ids": (BIASED, {"stop_token_ids": [37]}, lambda b, a: texts(a) == [""] and texts(b) == ["B" * 12]),
    "include_stop_str_in_output": (
        BIASED | {"stop": "B"},
        {"include_stop_str_in_output": True},
        lambda _, a: texts(a) == ["B"],
    ),
    "logit_bias": (GREEDY, {"logit_bias": {"37": 100}}, lambda _, a: texts(a) == ["B" * 12]),
    "presence_penalty": (
        GREEDY | {"logit_bias": {"37": 100, "38": 99.0, "39": 98.5}},
        {"presence_penalty": 2},
        fewer_repeats,
    ),
    "frequency_penalty": (
        GREEDY | {"logit_bias": {"37": 100, "38": 90, "39": 80}},
        {"frequency_penalty": 2},
        fewer_repeats,
    ),
    "repetition_penalty": (BIASED, {"repetition_penalty": 100}, fewer_repeats),
    "alpha_presence": (BIASED, {"alpha_presence": 100}, fewer_repeats),
    "alpha_frequency": (BIASED, {"alpha_frequency": 20}, fewer_repeats),
    "alpha_presence_src": (BIASED | {"prompt": [37]}, {"alpha_presence_src": 100}, lambda _, a: "B" not in texts(a)[0]),
    "alpha_frequency_src": (
        BIASED | {"prompt": [37]},
        {"alpha_frequency_src": 100},
        lambda _, a: "B" not in texts(a)[0],
    ),
    "alpha_src_penalty_end_idx": (
        BIASED | {"prompt": [37], "alpha_presence_src": 100},
        {"alpha_src_penalty_end_idx": 1},  # </s> alone
        lambda before, after: "B" not in texts(before)[0] and texts(after) == ["B" * 12],
    ),
    "lambda_decay": (HOT | {"top_p": 0.99}, {"lambda_decay": 0.1}, differs),
    "omega_bound": (HOT | {"top_p": 0.99, "lambda_decay": 0.1}, {"omega_bound": 0.9}, differs),
    "stream": (GREEDY, {"stream": True}, lambda _, after: str(after).endswith("data: [DONE]\n\n")),
    "stream_options": (
        GREEDY | {"stream": True},
        {"stream_options": {"include_usage": True}},
        lambda before, after: "usage" not in str(before) and '"total_tokens": 15' in str(after),
    ),
    "suffix": (GREEDY, {"suffix": "x"}, lambda _, after: "fill in" in after["message"]),
}
SILENT = {"model", "user", "timeout_ms", "priority", "api_key", "g-recaptcha-response"}
"""The page says that they change nothing of the text."""


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_does_what_the_page_says(name: str, service: Running) -> None:
    base, change, check = EFFECTS[name]
    (status, before), (_, after) = post(service, base), post(service, base | change)
    assert status == 200
    assert check(before, after), (before, after)


# what the switch changes: a body, and what is true of the answers without it and with it
COMPAT: dict[str, tuple[Body, Callable[[Answer, Answer], bool]]] = {
    "max_tokens": (GREEDY, lambda plain, compat: len(drawn(plain)) == len(drawn(compat)) + 1),
    "max_tokens absent": (
        {"prompt": IDS, "temperature": 0, "logit_bias": {"2": -100}, "logprobs": 0},
        lambda plain, compat: (len(drawn(plain)), len(drawn(compat))) == (16, WINDOW - 1 - len(IDS) - 1),
    ),
    "temperature": (HOT | {"temperature": 0.04}, lambda _, compat: compat["choices"][0]["finish_reason"] == "length"),
    "stop": (
        BIASED | {"stop": ["Bx"]},
        lambda plain, compat: (texts(plain), texts(compat)) == (["B" * 12], ["B"]),
    ),
    "logprobs": (
        {"prompt": IDS, "max_tokens": 3},
        lambda plain, compat: (
            plain["choices"][0]["logprobs"] is None and "finish_reason" in compat["choices"][0]["logprobs"]
        ),
    ),
    "echo": (
        GREEDY | {"echo": True},
        lambda plain, compat: (
            drawn(compat)[:4] == ["</s>", *drawn(plain)[:3]]
            and len(compat["choices"][0]["logprobs"]["text_offset"]) == len(drawn(compat)) - 1
        ),
    ),
    "the end": (
        GREEDY | {"ignore_eos": False, "logit_bias": {"2": 100}},
        lambda plain, compat: (drawn(plain), drawn(compat)) == (["</s>"], []),
    ),
}


@pytest.mark.parametrize("name", COMPAT)
def test_the_switch_changes_what_the_page_says(name: str, service: Running, compat_service: Running) -> None:
    body, check = COMPAT[name]
    (_, plain), (_, compat) = post(service, body), post(compat_service, body)
    assert check(plain, compat), (plain, compat)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [5] * 200, "max_tokens": 4},
        {"prompt": IDS, "n": 99, "max_tokens": 2},
        {"prompt": IDS, "best_of": 99, "max_tokens": 2},
        {"prompt": IDS, "top_p": 1.4, "max_tokens": 2},
        {"prompt": IDS, "min_tokens": 9, "max_tokens": 4},
        {"prompt": IDS, "temperature": "0.7", "max_tokens": "4"},
        {"prompt": IDS, "max_tokens": 500},
        {"prompt": IDS, "alpha_presence": -1, "max_tokens": 4},
        {"prompt": IDS, "omega_bound": 3, "max_tokens": 4},
        {"prompt": IDS, "echo": 1, "max_tokens": 4},
    ],
    ids=lambda body: ",".join(body),
)
def test_what_the_switch_cuts_or_takes_is_a_400_without_it(
    body: Body, service: Running, compat_service: Running
) -> None:
    assert (post(service, body)[0], post(compat_service, body)[0]) == (400, 200)
