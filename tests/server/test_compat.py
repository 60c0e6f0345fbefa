"""--metaseq-compat: a metaseq client's body means what it meant, its answer has the shape it had; and only with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine

from metaseq_api.core import Request, SamplingParams, TokenLogprobs
from metaseq_api.errors import RequestError
from metaseq_api.server import schema
from metaseq_api.server.app import create_app
from metaseq_api.settings import Settings

WINDOW = 64


@pytest.fixture
def settings() -> Settings:
    return Settings(max_beam=4, max_queue=100, metaseq_compat=True)


def parse(body: dict[str, Any], engine: FakeEngine, settings: Settings) -> Request:
    return schema.parse_completion({"prompt": "hi", **body}, engine, settings, "cmpl-1")


def params(body: dict[str, Any], engine: FakeEngine, settings: Settings) -> SamplingParams:
    return parse(body, engine, settings).params


@pytest.mark.parametrize(
    ("sent", "meant"),
    [(0.95, 0.9), (0.85, 0.8), (0.75, 0.8), (0.25, 0.2), (0.05, 0.1), (0.04, 0.0), (0.96, 1.0), (0.99, 1.0)],
)
def test_numbers_are_rounded_to_one_decimal_as_metaseq_did(
    sent: float, meant: float, engine: FakeEngine, settings: Settings
) -> None:
    names = ("temperature", "top_p", "omega_bound", "alpha_presence", "alpha_frequency", "alpha_presence_src")
    got = params({**dict.fromkeys(names, sent), "lambda_decay": 0.5}, engine, settings)
    assert [getattr(got, name) for name in names] == [meant] * len(names)
    exact = params(dict.fromkeys(names, sent), engine, dataclasses.replace(settings, metaseq_compat=False))
    assert [getattr(exact, name) for name in names] == [sent] * len(names)


def test_numbers_may_be_spelled_as_strings_and_lengths_have_fractions(engine: FakeEngine, settings: Settings) -> None:
    body = {"max_tokens": "9", "temperature": "0.7", "top_p": "1", "logprobs": "2", "best_of": 2.9, "min_tokens": "1"}
    got = params(body, engine, settings)
    assert (got.max_tokens, got.temperature, got.top_p, got.logprobs, got.best_of, got.min_tokens) == (
        *(8, 0.7, 1.0, 2, 2, 1),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in ("hot", -0.3, [], True, "nan", "inf")],
        *[("max_tokens", v) for v in ("many", -1, True, {})],
        *[("logprobs", v) for v in ([], False, -1)],
        *[("stop", v) for v in ("", ["a", ""], [7], 7)],
        *[("best_of", v) for v in ("x", -1)],
        *[("n", v) for v in ("2", 0, 1.5)],
        *[("lambda_decay", v) for v in (1.1, "x")],
        ("prompt", []),
        ("stop_tokens", [1]),
    ],
)
def test_what_metaseq_answered_with_a_500_is_refused_by_name(
    name: str, value: Any, engine: FakeEngine, settings: Settings
) -> None:
    with pytest.raises(RequestError) as caught:
        parse({name: value}, engine, settings)
    assert caught.value.param == name


def test_n_tokens_asked_for_are_one_fewer_and_none_of_them_is_an_error(engine: FakeEngine, settings: Settings) -> None:
    assert [params({"max_tokens": n}, engine, settings).max_tokens for n in (0, 1, 2, 16)] == [0, 0, 1, 15]
    assert params({"max_tokens": 8, "min_tokens": 8}, engine, settings).min_tokens == 7


def test_without_max_tokens_the_window_is_filled(engine: FakeEngine, settings: Settings) -> None:
    assert params({"prompt": "x" * 20}, engine, settings).max_tokens == WINDOW - 1 - 20 - 1
    assert params({"prompt": ["x" * 20, "y"]}, engine, settings).max_tokens == WINDOW - 1 - 20 - 1


def test_a_prompt_that_is_too_long_keeps_its_end(engine: FakeEngine, settings: Settings) -> None:
    text = "".join(chr(33 + i) for i in range(90))
    got = parse({"prompt": [text, "short"], "max_tokens": 10}, engine, settings)
    kept = WINDOW - 10 - 1
    assert got.prompts == (tuple(engine.encode(text[-kept:])), tuple(engine.encode("short")))
    assert got.params.max_tokens == 9
    assert parse({"prompt": text}, engine, settings).prompts[0] == tuple(engine.encode(text[-(WINDOW - 1) :]))


@pytest.mark.parametrize("max_tokens", [WINDOW - 1, WINDOW, 4000])
def test_a_length_beyond_the_window_is_cut_where_metaseqs_slices_went_astray(
    max_tokens: int, engine: FakeEngine, settings: Settings
) -> None:
    got = parse({"prompt": "abc", "max_tokens": max_tokens}, engine, settings)
    assert got.prompts == (tuple(engine.encode("abc")),)
    assert got.params.max_tokens == WINDOW - 4 - 1


def test_of_a_stop_string_the_first_token_counts_and_stays(engine: FakeEngine, settings: Settings) -> None:
    got = params({"stop": ["\n\nHuman:", "Q"]}, engine, settings)
    assert got.stop == ()
    assert got.stop_token_ids == (engine.encode("\n")[0], engine.encode("Q")[0])
    assert got.include_stop_str_in_output
    both = params({"stop": "a", "stop_token_ids": [9], "include_stop_str_in_output": False}, engine, settings)
    assert both.stop_token_ids == (engine.encode("a")[0], 9)
    assert not both.include_stop_str_in_output


def test_what_was_out_of_range_is_cut_where_metaseq_cut_it(engine: FakeEngine, settings: Settings) -> None:
    got = params({"best_of": 9, "n": 7, "top_p": 3, "omega_bound": -1, "alpha_presence": -2.0}, engine, settings)
    assert (got.best_of, got.n, got.top_p, got.omega_bound, got.alpha_presence) == (4, 4, 1.0, 0.0, 0.0)
    assert params({"n": 7}, engine, settings).n == 4
    assert params({"top_p": -1}, engine, settings).greedy
    mixed = params({"alpha_presence": -2.0, "alpha_frequency": 0.5}, engine, settings)
    assert (mixed.alpha_presence, mixed.alpha_frequency) == (-2.0, 0.5)


def test_echo_is_whatever_python_holds_for_true(engine: FakeEngine, settings: Settings) -> None:
    assert [params({"echo": v}, engine, settings).echo for v in (1, "no", 0, "", None, True)] == [
        *(True, True, False, False, False, True),
    ]


def ask(engine: FakeEngine, settings: Settings, **body: Any) -> dict[str, Any]:
    client: FlaskClient = create_app(engine, settings).test_client()
    answer = client.post("/v1/engines/175b/completions", json={"prompt": "abc", **body})
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json["choices"][0]  # type: ignore[index]
    return choice


def test_an_answer_always_has_log_probabilities_and_its_end_twice(engine: FakeEngine, settings: Settings) -> None:
    choice = ask(engine, settings, max_tokens=4)
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": None,
        "text_offset": [0, 1, 2],
        "finish_reason": "length",
    }
    assert choice["finish_reason"] == "length"


def test_an_echo_begins_with_the_end_of_text_token_that_has_no_offset(engine: FakeEngine, settings: Settings) -> None:
    logprobs = ask(engine, settings, max_tokens=3, echo=True, logprobs=1)["logprobs"]
    assert logprobs["tokens"] == ["</s>", "a", "b", "c", "a", "b"]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 6
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("echo", [True, False])
def test_the_token_that_ended_a_text_is_in_openais_lists_and_not_in_metaseqs(echo: bool, engine: FakeEngine) -> None:
    asked = SamplingParams(max_tokens=3, echo=echo, logprobs=1)
    request = Request(request_id="r", prompts=(tuple(engine.encode("abc")),), params=asked)
    whole = engine.complete(request, 0, 0)
    assert whole.logprobs is not None
    end = TokenLogprobs(tokens=("</s>",), token_logprobs=(-1.0,), top_logprobs=({"</s>": -1.0},), text_offset=(6,))
    ended = dataclasses.replace(whole, logprobs=TokenLogprobs.joined([whole.logprobs, end]))
    for compat, last in ((False, "</s>"), (True, "c")):
        answer = schema.render_completion(request, [ended], model="m", created=0, metaseq_compat=compat)
        lists = answer["choices"][0]["logprobs"]
        assert lists["tokens"][-1] == last
        assert len(lists["tokens"]) == len(lists["token_logprobs"]) == len(lists["top_logprobs"])
    if not echo:
        assert schema.render_generate("abc", ended) == schema.render_generate("abc", whole)


def test_without_the_switch_an_answer_is_openais(engine: FakeEngine, settings: Settings) -> None:
    plain = dataclasses.replace(settings, metaseq_compat=False)
    assert ask(engine, plain, max_tokens=4) == {
        "index": 0,
        "text": "abcd",
        "logprobs": None,
        "finish_reason": "length",
    }


def test_the_page_of_metaseq_works_either_way(engine: FakeEngine, settings: Settings) -> None:
    page = {"max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "omega_bound": 0.3, "lambda_decay": 0}
    page |= dict.fromkeys(("alpha_presence", "alpha_frequency", "alpha_presence_src", "alpha_frequency_src"), 0.0)
    for compat, num in ((True, 15), (False, 16)):
        chosen = dataclasses.replace(settings, metaseq_compat=compat)
        assert len(ask(engine, chosen, **page)["text"]) == num


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.floats(0, 2).map(str)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text("0123456789x", max_size=3), SCALARS)


@given(body=st.dictionaries(st.sampled_from(sorted(schema.COMPLETION_FIELDS - {"prompt"})), VALUES, max_size=6))
@hypothesis_settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_body_is_more_than_refused(body: dict[str, Any], engine: FakeEngine, settings: Settings) -> None:
    for compat in (True, False):
        refused_for = None
        try:
            parse(body, engine, dataclasses.replace(settings, metaseq_compat=compat))
        except RequestError as error:
            refused_for = error.param
        assert refused_for in {None, *body, "max_tokens", "stop_token_ids"}
