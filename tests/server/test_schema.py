"""Bodies to Requests and Completions to answers, without HTTP."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine

from metaseq_api.core import RankedToken, SamplingParams
from metaseq_api.errors import RequestError
from metaseq_api.server import fields, schema, terms
from metaseq_api.settings import Settings


def parse(body: dict[str, Any], engine: FakeEngine, settings: Settings) -> Any:
    return schema.parse_completion(body, engine, settings, "cmpl-1")


def refusal(body: dict[str, Any], engine: FakeEngine, settings: Settings) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, engine, settings)
    return caught.value


def test_all_that_is_left_out_has_its_default(engine: FakeEngine, settings: Settings) -> None:
    request = parse({"prompt": "hi"}, engine, settings)
    assert request.params == SamplingParams()
    assert request.params.max_tokens == 16
    assert request.prompts == (tuple(engine.encode("hi")),)


def test_null_means_the_default_for_every_field_but_the_prompt(engine: FakeEngine, settings: Settings) -> None:
    names = schema.COMPLETION_FIELDS - {"prompt"}
    request = parse({"prompt": "hi", **dict.fromkeys(names)}, engine, settings)
    assert request.params == SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", ((101, 102),)),
        (["ab", "c"], ((101, 102), (103,))),
        ([101, 0, 259], ((101, 0, 259),)),
        ([[101], [5, 6]], ((101,), (5, 6))),
        ("", ((),)),
        (["", "a"], ((), (101,))),
        ("a\r\nb\rc", ((101, 14, 102, 14, 103),)),
    ],
)
def test_a_prompt_comes_in_four_forms(prompt: Any, ids: Any, engine: FakeEngine, settings: Settings) -> None:
    assert parse({"prompt": prompt}, engine, settings).prompts == ids


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "prompt is missing; it must be a string, an array of strings"),
        ([], "prompt is an array of 0; it must be a string"),
        ({}, "prompt is an object of 0; it must be a string"),
        (3, "prompt is 3; it must be a string"),
        (True, "prompt is true (a boolean); it must be a string"),
        ([[]], "prompt[0] is an array of 0; it must be a non-empty array of token ids"),
        ([True], "prompt[0] is true (a boolean); it must be a string, a token id or"),
        ([None], "prompt[0] is null; it must be a string, a token id or"),
        ([5, True], "prompt[1] is true (a boolean); it must be a token id"),
        ([5, "a"], 'prompt[1] is "a" (a string); it must be a token id'),
        ([5, 6.0], "prompt[1] is 6.0; it must be a token id"),
        ([5, 260], "prompt[1] is 260; it must be a token id, a whole number from 0 to 259"),
        ([-1], "prompt[0] is -1; it must be a token id"),
        ([1.5], "prompt[0] is 1.5; it must be a token id"),
        (["a", 5], "prompt[1] is 5; it must be a string"),
        (["a", ["b"]], "prompt[1] is an array of 1; it must be a string"),
        ([[5], "a"], 'prompt[1] is "a" (a string); it must be a non-empty array'),
        ([[5], [6, "a"]], 'prompt[1][1] is "a" (a string); it must be a token id'),
        ([[[5]]], "prompt[0][0] is an array of 1; it must be a token id"),
        ("a\ud800", "prompt holds half a surrogate pair at character 1"),
        (["ok", "\udc00"], "prompt[1] holds half a surrogate pair at character 0"),
        (["a"] * 1025, "prompt is an array of 1025; it must be at most 1024 prompts"),
        ("x" * 20000, "prompt is 20000 characters long, far over the model's 64 tokens"),
    ],
)
def test_a_prompt_of_another_form_is_refused_by_place(
    prompt: Any, says: str, engine: FakeEngine, settings: Settings
) -> None:
    error = refusal({"prompt": prompt}, engine, settings)
    assert str(error).startswith(says)
    assert error.param == "prompt"


WRONG_TYPES = {
    "max_tokens": ["16", True, 1.5, [16], {}, 1e999, -1, 0, 10**30],
    "min_tokens": ["1", False, 0.5, [], -1, 17],
    "temperature": ["hot", True, [], -0.1, 1e999, 10**400, 101],
    "top_p": ["all", False, {}, -0.1, 1.1],
    "top_k": ["2", True, 2.5, -2],
    "n": ["2", True, 1.5, 0, -1, 129, 5],
    "best_of": ["2", False, 0, 129, 5],
    "seed": ["7", True, 0.5, [7], 2**63],
    "stop": [7, True, {}, [7], [None], "", ["a", ""], ["a"] * 65, "x" * 1025, "\ud800"],
    "echo": ["true", 1, 0, []],
    "logprobs": ["1", True, 0.5, -1, 101],
    "ignore_eos": ["false", 0, {}],
    "model": [7, True, ["fake"], "\ud800"],
    "user": [7, {}, "x" * 257],
    "stream": ["false", 1, 0],
    "omega_bound": ["0.3", True, 1e999, -0.1, 1.1],
    "suffix": ["end", 0, False, []],
    "logit_bias": [
        [],
        "5",
        {"five": 1},
        {"-5": 1},
        {" 5": 1},
        {"": 1},
        {"\u0665": 1},
        {"5.0": 1},
        {"260": 1},
        {"9" * 5000: 1},
        {"5": "1"},
        {"5": True},
        {"5": None},
        {"5": 100.1},
        {"5": -101},
        {"5": 1e999},
        {"5": 1, "05": 1},
        {str(i): 0 for i in range(1025)},
    ],
    "presence_penalty": [False, "0", -2.1, 2.1],
    "frequency_penalty": [[], "0", -2.1, 2.1],
    "lambda_decay": [1.1, "0.9", True],
    "alpha_presence": ["1", True, 101, -1],
    "alpha_frequency": ["1", True, -101, -0.1],
    "alpha_presence_src": ["1", {}, 1e9, -1],
    "alpha_frequency_src": ["1", [], -1e9, -0.1],
    "alpha_src_penalty_end_idx": ["3", 2.5, True],
    "stream_options": [[], "x", True],
    "repetition_penalty": ["1", True, 0, -1, 101],
    "min_p": ["0", True, -0.1, 1.1],
    "stop_token_ids": [2, "2", {}, [True], ["2"], [None], [1.5], [-1], [260], [10**30], [5] * 129],
    "include_stop_str_in_output": ["true", 1, []],
    "prompt_logprobs": ["1", True, 0.5, -1, 101],
    "api_key": ["a-key", 1],
    "g-recaptcha-response": ["03AG", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in WRONG_TYPES.items() for v in values])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    name: str, value: Any, engine: FakeEngine, settings: Settings
) -> None:
    error = refusal({"prompt": "hi", name: value}, engine, settings)
    assert error.param == name
    assert str(error).startswith(name)


def test_no_field_is_left_out_of_the_table_of_wrong_types() -> None:
    assert set(WRONG_TYPES) == schema.COMPLETION_FIELDS - {"prompt"} - terms.FIELDS


def test_the_page_on_fields_has_a_row_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fields.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w-]+)`", " ".join(rows))) >= schema.COMPLETION_FIELDS


def test_what_says_off_to_openai_vllm_or_metaseq_says_off_here(engine: FakeEngine, settings: Settings) -> None:
    for off in (
        {"suffix": ""},
        {"logit_bias": {}},
        {"stop": [], "stop_token_ids": []},
        {"top_k": 0},
        {"top_k": -1},
        {"min_p": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1},
        {"alpha_src_penalty_end_idx": -1, "lambda_decay": -1},
        {"omega_bound": 0.3, "lambda_decay": 0, "alpha_presence": 0.0, "alpha_frequency": 0.0},
    ):
        assert parse({"prompt": "hi", **off}, engine, settings).params == SamplingParams()


def test_a_suffix_is_refused_with_the_reason(engine: FakeEngine, settings: Settings) -> None:
    error = refusal({"prompt": "hi", "suffix": "end"}, engine, settings)
    assert str(error) == (
        'suffix is "end" (a string); OPT was trained to continue a text, not to fill in before a suffix: leave it out'
    )
    assert error.code == "unsupported_field"


def test_no_tokens_are_asked_for_only_where_a_prompt_is_scored(engine: FakeEngine, settings: Settings) -> None:
    error = refusal({"prompt": "hi", "max_tokens": 0, "logprobs": 1}, engine, settings)
    assert str(error) == (
        "max_tokens is 0; it must be 1 or more, unless echo is true or prompt_logprobs given (to score it)"
    )
    assert parse({"prompt": "hi", "max_tokens": 0, "prompt_logprobs": 0}, engine, settings).params.max_tokens == 0
    assert parse({"prompt": "hi", "max_tokens": 0, "echo": True}, engine, settings).params.max_tokens == 0


def test_a_stream_is_one_where_it_is_asked_for_alone(engine: FakeEngine, settings: Settings) -> None:
    assert parse({"prompt": "hi", "stream": True}, engine, settings).stream
    for body in ({"prompt": "hi"}, {"prompt": "hi", "stream": False}, {"prompt": "hi", "stream": None}):
        assert not parse(body, engine, settings).stream


@pytest.mark.parametrize(
    ("name", "says"),
    [("max_token", "did you mean max_tokens?"), ("zzz", "known are "), ("x" * 10000, "known are ")],
)
def test_an_unknown_field_is_refused_with_its_nearest_neighbour(
    name: str, says: str, engine: FakeEngine, settings: Settings
) -> None:
    error = refusal({"prompt": "hi", name: 1}, engine, settings)
    assert error.code == "unknown_field"
    assert says in str(error)
    assert len(str(error)) < schema.MAX_MESSAGE_LEN


def test_every_value_reaches_its_parameter(engine: FakeEngine, settings: Settings) -> None:
    body = {
        "prompt": "hi",
        "model": "anything",
        "user": "me",
        "max_tokens": 8.0,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 10**30,
        "seed": -5,
        "stop": ["x", "yz"],
        "n": 2,
        "best_of": 3,
        "echo": True,
        "logprobs": 3,
        "ignore_eos": True,
        "min_p": 0.1,
        "stop_token_ids": [7, 8.0],
        "include_stop_str_in_output": True,
        "prompt_logprobs": 2,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.2,
        "logit_bias": {"250": 1.5, "7": -100},
        "alpha_presence": 0.5,
        "alpha_frequency": 0.25,
        "alpha_presence_src": 0.75,
        "alpha_frequency_src": 1,
        "alpha_src_penalty_end_idx": 4,
        "lambda_decay": 0.9,
        "omega_bound": 0.4,
    }
    others = {*terms.FIELDS, *schema.STREAM_FIELDS, *schema.ALPA_KEYS, "suffix"}
    assert set(body) | others == schema.COMPLETION_FIELDS
    request = parse(body, engine, settings)
    assert request.user == "me"
    assert request.params == SamplingParams(
        max_tokens=8,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=engine.vocab_size,
        seed=-5,
        stop=("x", "yz"),
        n=2,
        best_of=3,
        echo=True,
        logprobs=3,
        ignore_eos=True,
        min_p=0.1,
        stop_token_ids=(7, 8),
        include_stop_str_in_output=True,
        prompt_logprobs=2,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.2,
        logit_bias=((7, -100.0), (250, 1.5)),
        alpha_presence=0.5,
        alpha_frequency=0.25,
        alpha_presence_src=0.75,
        alpha_frequency_src=1.0,
        alpha_src_penalty_end_idx=4,
        lambda_decay=0.9,
        omega_bound=0.4,
    )
    assert hash(request.params) == hash(parse(dict(reversed(body.items())), engine, settings).params)
    assert type(request.params.max_tokens) is int


def test_a_length_that_just_fits_is_taken_and_one_more_names_what_would_fit(
    engine: FakeEngine, settings: Settings
) -> None:
    prompt = "x" * 40
    assert parse({"prompt": prompt, "max_tokens": 24}, engine, settings).params.max_tokens == 24
    error = refusal({"prompt": prompt, "max_tokens": 25}, engine, settings)
    assert error.param == "max_tokens"
    assert error.code == "context_length_exceeded"
    assert str(error) == (
        "max_tokens is 25, but prompt and the leading </s> take 41 of the model's window of 64 tokens; "
        "at most 24 fit (the last needs no place), or shorten the prompt"
    )


def test_a_prompt_too_long_by_itself_is_named_with_its_place(engine: FakeEngine, settings: Settings) -> None:
    assert parse({"prompt": "x" * 63, "max_tokens": 1}, engine, settings)
    error = refusal({"prompt": ["ok", "x" * 64], "max_tokens": 1}, engine, settings)
    assert error.param == "prompt"
    assert str(error) == (
        "prompt[1] is 64 tokens long; the model's window of 64 tokens takes at most 63, so shorten it"
    )
    assert parse({"prompt": "x" * 63, "max_tokens": 0, "echo": True}, engine, settings)
    assert refusal({"prompt": "x" * 64, "max_tokens": 0, "echo": True}, engine, settings).param == "prompt"


def test_an_answer_of_too_many_log_probabilities_is_refused(settings: Settings) -> None:
    engine = FakeEngine(max_seq_len=2048)
    big = dataclasses.replace(settings, max_beam=16, max_queue=4096)
    one = {"prompt": [5] * 2000, "max_tokens": 40, "n": 16, "echo": True, "logprobs": 100, "prompt_logprobs": 100}
    assert parse(one, engine, big)
    many = {"prompt": [[5] * 2000] * 128, "max_tokens": 0, "echo": True, "logprobs": 40}
    error = refusal(many, engine, big)
    assert error.param == "logprobs"
    assert "up to 10496000 log-probabilities are asked for" in str(error)
    assert refusal({**many, "prompt_logprobs": 1}, engine, big).param == "prompt_logprobs"
    assert parse({**many, "logprobs": 1}, engine, big)


def test_more_samples_than_the_operator_allows_are_refused_with_the_bound(
    engine: FakeEngine, settings: Settings
) -> None:
    assert str(refusal({"prompt": "a", "n": 5}, engine, settings)) == (
        "n is 5; it must be at most 4, this server's MAX_BEAM"
    )
    assert refusal({"prompt": "a", "n": 2, "best_of": 5}, engine, settings).param == "best_of"
    assert refusal({"prompt": ["a"] * 26, "n": 4}, engine, settings).param == "prompt"
    assert parse({"prompt": ["a"] * 25, "n": 4}, engine, settings)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the body is empty"),
        (b"  \n", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b'{"prompt": "a",}', "the body is not JSON"),
        (b"prompt=hi", "the body is not JSON"),
        (b"[1]", "the body is an array of 1; it must be a JSON object"),
        (b'"hi"', 'the body is "hi" (a string); it must be a JSON object'),
        (b"null", "the body is null"),
        (b'{"prompt": "\xff"}', "the body is not UTF-8 at byte 12"),
        (b'{"temperature": NaN}', "the body holds NaN"),
        (b'{"temperature": -Infinity}', "the body holds -Infinity"),
        (b'{"a": ' * 200_000, "the body is nested too deep"),
        (b"[" * 200_000, "the body is nested too deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", "the body holds a number of too many digits"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        fields.read_json(raw)
    assert str(caught.value).startswith(says)
    assert caught.value.code == "invalid_json"


def test_a_key_given_twice_counts_with_its_last_value_and_a_byte_order_mark_is_skipped() -> None:
    assert fields.read_json(b'\xef\xbb\xbf{"n": 1, "n": 2}') == {"n": 2}


def test_generate_asks_for_exactly_length_tokens(engine: FakeEngine) -> None:
    request = schema.parse_generate({"prefix": "ab", "length": 5}, engine, "gen-1")
    assert request.prompts == ((101, 102),)
    assert request.params == SamplingParams(
        max_tokens=5, min_tokens=5, ignore_eos=True, temperature=0.7, top_p=0.9, logprobs=0
    )


def test_generate_with_a_stop_string_may_end_earlier(engine: FakeEngine) -> None:
    request = schema.parse_generate({"prefix": "ab", "length": 5, "stop": "c"}, engine, "gen-1")
    assert (request.params.min_tokens, request.params.stop) == (0, ("c",))
    request = schema.parse_generate({"prefix": "ab", "length": 5, "stop": "c", "min_tokens": 3}, engine, "gen-1")
    assert request.params.min_tokens == 3


def test_generate_takes_what_shapes_one_sample(engine: FakeEngine) -> None:
    body = {"prefix": "ab", "length": 5, "alpha_presence": 0.5, "logit_bias": {"9": 1}, "stop_token_ids": [9]}
    got = schema.parse_generate(body, engine, "gen-1").params
    assert (got.alpha_presence, got.logit_bias, got.stop_token_ids, got.min_tokens) == (0.5, ((9, 1.0),), (9,), 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prefix"),
        ({"prefix": "a"}, "length"),
        ({"length": 4}, "prefix"),
        ({"prefix": ["a"], "length": 4}, "prefix"),
        ({"prefix": "a", "length": "4"}, "length"),
        ({"prefix": "a", "length": 0}, "length"),
        ({"prefix": "a", "length": 64}, "length"),
        ({"prefix": "x" * 64, "length": 1}, "prefix"),
        ({"prefix": "a", "length": 4, "min_tokens": 5}, "min_tokens"),
        ({"prefix": "a", "length": 4, "top_p": 2}, "top_p"),
        ({"prefix": "a", "length": 4, "n": 2}, "n"),
    ],
)
def test_generate_refuses_by_name(body: dict[str, Any], param: str, engine: FakeEngine) -> None:
    with pytest.raises(RequestError) as caught:
        schema.parse_generate(body, engine, "gen-1")
    assert caught.value.param == param


def test_a_form_has_the_types_json_would_give_it() -> None:
    form = {"prefix": ["12"], "length": ["5"], "top_p": ["0.5"], "ignore_eos": ["False"], "seed": [""], "stop": ["1"]}
    assert schema.form_to_body(form) == {
        "prefix": "12",
        "length": 5,
        "top_p": 0.5,
        "ignore_eos": False,
        "stop": "1",
    }
    assert schema.form_to_body({"stop": ["a", "b"], "length": ["five"]}) == {"stop": ["a", "b"], "length": "five"}
    with pytest.raises(RequestError, match='"length" is given 2 times'):
        schema.form_to_body({"length": ["1", "2"]})


def test_an_answer_holds_no_number_that_json_has_not(engine: FakeEngine, settings: Settings) -> None:
    request = parse({"prompt": "a", "max_tokens": 2, "logprobs": 1, "echo": True}, engine, settings)
    answer = schema.render_completion(request, [engine.complete(request, 0, 0)], model="m", created=1)
    json.dumps(answer, allow_nan=False)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"a": -0.5, "never": -9999.0}, {"b": -0.5, "never": -9999.0}]
    assert schema.finite(float("nan")) == -9999.0


def test_prompt_scores_are_written_as_vllm_writes_them(engine: FakeEngine, settings: Settings) -> None:
    request = parse({"prompt": "ab", "prompt_logprobs": 1}, engine, settings)
    ranked = {101: RankedToken("a", -0.5, 2), 102: RankedToken("b", float("-inf"), 1)}
    completion = dataclasses.replace(engine.complete(request, 0, 0), prompt_logprobs=(None, ranked))
    answer = schema.render_completion(request, [completion], model="m", created=1)
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "101": {"logprob": -0.5, "rank": 2, "decoded_token": "a"},
            "102": {"logprob": -9999.0, "rank": 1, "decoded_token": "b"},
        },
    ]
    json.dumps(answer, allow_nan=False)
    plain = schema.render_completion(request, [engine.complete(request, 0, 0)], model="m", created=1)
    assert "prompt_logprobs" not in plain["choices"][0]


def test_an_error_message_is_cut_before_it_grows_without_bound() -> None:
    assert len(schema.render_error(RequestError("x" * 10**6))["error"]["message"]) == schema.MAX_MESSAGE_LEN
