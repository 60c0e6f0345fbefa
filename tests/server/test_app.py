"""The routes and every error through flask's test client: no socket, no thread."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine

from metaseq_api import errors
from metaseq_api.errors import EngineStopped, MetaseqApiError, Overloaded, RequestError
from metaseq_api.server import params, schema
from metaseq_api.server.app import COMPLETION_PATHS, MAX_BODY, create_app
from metaseq_api.settings import Settings

ASK = {"prompt": "hi", "max_tokens": 4}


@pytest.mark.parametrize("path", [*COMPLETION_PATHS, "/completions/", "/v1/completions/"])
def test_every_completion_path_answers_alike(path: str, client: FlaskClient) -> None:
    for name in ("175b", "facebook/opt-125m"):
        answer = client.post(path.replace("<path:engine>", name), json=ASK)
        assert answer.status_code == 200
        assert answer.json["choices"] == [{"index": 0, "text": "abcd", "logprobs": None, "finish_reason": "length"}]


def test_a_completion_has_the_shape_of_openai(engine: FakeEngine, settings: Settings) -> None:
    client = create_app(engine, settings, clock=lambda: 1234.5, new_id=lambda: "f00").test_client()
    answer = client.post("/v1/completions", json={**ASK, "model": "/secret/path", "logprobs": 1})
    assert answer.mimetype == "application/json"
    assert answer.json == {
        "id": "cmpl-f00",
        "object": "text_completion",
        "created": 1234,
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "text": "abcd",
                "logprobs": {
                    "tokens": ["a", "b", "c", "d"],
                    "token_logprobs": [-0.5] * 4,
                    "text_offset": [2, 3, 4, 5],
                    "top_logprobs": [{t: -0.5, "never": -9999.0} for t in "abcd"],
                },
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }


def test_choices_are_flat_prompts_outer_samples_inner_and_usage_counts_a_prompt_once(client: FlaskClient) -> None:
    body = {"prompt": ["hi", "there"], "max_tokens": 3, "n": 2, "stop": "c", "echo": True}
    answer = client.post("/v1/completions", json=body).json
    assert [(c["index"], c["text"], c["finish_reason"]) for c in answer["choices"]] == [
        (0, "hiab", "stop"),
        (1, "hib", "stop"),
        (2, "thereab", "stop"),
        (3, "thereb", "stop"),
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}


@pytest.mark.parametrize("how", ["json", "data"])
def test_generate_answers_as_metaseq_once_did_to_json_and_to_a_form(how: str, client: FlaskClient) -> None:
    answer = client.post("/generate", **{how: {"prefix": "1\r\n2", "length": 3}})
    assert answer.status_code == 200
    assert answer.json == {
        "text": "abc",
        "tokens": ["a", "b", "c"],
        "text_offset": [0, 1, 2],
        "token_scores": [-0.5, -0.5, -0.5],
        "top_logprobs": None,
        "prompt": "1\n2",
        "result": "success",
    }


def test_generate_takes_a_multipart_form_but_no_file(client: FlaskClient) -> None:
    fields = {"prefix": "a", "length": "2", "stop": ["b", "x"]}
    answer = client.post("/generate", data=fields, content_type="multipart/form-data")
    assert answer.json["text"] == "a"
    with open(__file__, "rb") as file:
        answer = client.post("/generate", data={"prefix": file, "length": "2"}, content_type="multipart/form-data")
    assert answer.status_code == 400
    assert "file" in answer.json["error"]["message"]


def test_the_model_list_names_the_one_model_and_its_window(client: FlaskClient) -> None:
    answer = client.get("/v1/models").json
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 64)
    assert isinstance(model["created"], int)


def test_health_is_200_with_the_engines_own_numbers_and_503_once_it_answers_no_more(
    client: FlaskClient, engine: FakeEngine
) -> None:
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json == {
        "status": "ok",
        "model": "fake",
        "alive": True,
        "reason": "",
        "num_running": 0,
        "num_waiting": 0,
        "num_free_blocks": 8,
        "num_blocks": 8,
        "rank_age_s": [0.25, None],
        "stuck": False,
        "ready": True,
        "step_age_s": None,
    }
    engine.stopped = "rank 1 died"
    answer = client.get("/health")
    assert (answer.status_code, answer.json["status"], answer.json["reason"]) == (503, "stopped", "rank 1 died")
    assert answer.headers["Retry-After"] == "5"


ERRORS: dict[str, tuple[int, str, str]] = {
    "MetaseqApiError": (500, "server_error", "internal_error"),
    "SettingsError": (500, "server_error", "settings"),
    "ParallelSizeError": (500, "server_error", "parallel_size"),
    "CheckpointError": (500, "server_error", "checkpoint"),
    "CheckpointNotFound": (500, "server_error", "checkpoint"),
    "CheckpointCorrupt": (500, "server_error", "checkpoint"),
    "CheckpointMismatch": (500, "server_error", "checkpoint"),
    "TokenizerError": (500, "server_error", "tokenizer"),
    "ResourceError": (500, "server_error", "resource"),
    "PortInUse": (500, "server_error", "resource"),
    "MemoryTooSmall": (500, "server_error", "resource"),
    "RankFailed": (500, "server_error", "rank_failed"),
    "ClusterError": (500, "server_error", "cluster"),
    "ServiceError": (500, "server_error", "service"),
    "RequestError": (400, "invalid_request_error", "invalid_value"),
    "NotAuthorized": (401, "authentication_error", "invalid_api_key"),
    "Forbidden": (403, "permission_error", "forbidden"),
    "NotFound": (404, "invalid_request_error", "not_found"),
    "MethodNotAllowed": (405, "invalid_request_error", "method_not_allowed"),
    "PayloadTooLarge": (413, "invalid_request_error", "payload_too_large"),
    "UnsupportedMediaType": (415, "invalid_request_error", "unsupported_media_type"),
    "Overloaded": (429, "rate_limit_error", "overloaded"),
    "RateLimited": (429, "rate_limit_error", "rate_limit_exceeded"),
    "QuotaExceeded": (429, "insufficient_quota", "insufficient_quota"),
    "DeadlineExceeded": (504, "timeout_error", "deadline_exceeded"),
    "EngineStopped": (503, "server_error", "engine_stopped"),
    "NotBegun": (503, "server_error", "engine_stopped"),
    "RuntimeError": (500, "server_error", "internal_error"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_class_has_its_status_and_its_json(name: str, client: FlaskClient, engine: FakeEngine) -> None:
    error_class = RuntimeError if name == "RuntimeError" else getattr(errors, name)
    engine.fail_with = error_class("in /secret/place")
    answer = client.post("/v1/completions", json=ASK, headers={"X-Request-Id": "r1"})
    status, error_type, code = ERRORS[name]
    assert (answer.status_code, answer.mimetype) == (status, "application/json")
    assert set(answer.json) == {"error"}
    error = answer.json["error"]
    message = error.pop("message")
    assert error == {"type": error_type, "param": None, "code": code}
    if issubclass(error_class, RequestError):
        assert message == "in /secret/place"
    else:
        assert message == "something went wrong in the server; its log has the reason under request id r1"
        assert answer.headers["x-should-retry"] == "false"
    comes_back = status in (429, 503) and error_class.worth_retrying if issubclass(error_class, RequestError) else False
    assert ("Retry-After" in answer.headers) == comes_back


def test_the_table_of_errors_holds_every_class_of_the_tree() -> None:
    tree = {name for name, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, MetaseqApiError)}
    assert set(ERRORS) == tree | {"RuntimeError"}


def test_an_error_on_submit_is_answered_like_one_from_the_answer(client: FlaskClient, engine: FakeEngine) -> None:
    engine.stopped = "the engine is stopping; ask again later"
    answer = client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.json["error"]["message"]) == (503, engine.stopped)


def test_a_proxy_is_told_by_425_what_was_not_begun_and_nobody_else_is(client: FlaskClient, engine: FakeEngine) -> None:
    proxied = {"X-Retry-Elsewhere": "1"}
    engine.fail_with = EngineStopped("the engine failed")  # in the middle of it, and it may be why
    assert client.post("/v1/completions", json=ASK, headers=proxied).status_code == 503
    engine.stopped = "the engine is stopping; ask again later"
    for body in (ASK, ASK | {"stream": True}):
        assert client.post("/v1/completions", json=body).status_code == 503
        answer = client.post("/v1/completions", json=body, headers=proxied)
        assert (answer.status_code, answer.json["error"]["code"]) == (425, "engine_stopped")
        assert answer.headers["Retry-After"] == "5"


def test_the_cause_of_a_500_is_in_the_log_under_the_request_id_and_not_in_the_answer(
    client: FlaskClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_with = ValueError("disk /secret is full")
    answer = client.post("/v1/completions", json=ASK)
    request_id = answer.headers["X-Request-Id"]
    assert request_id in answer.json["error"]["message"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    (record,) = [r for r in caplog.records if r.exc_info]
    assert request_id in record.getMessage()
    assert "disk /secret is full" in caplog.text


BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int, str, str]] = [
    ("GET", "/nowhere", {}, 404, "not_found", "POST /v1/completions"),
    ("POST", "/v1//completions", {"json": ASK}, 404, "not_found", "no such route"),
    ("GET", "/v1/completions", {}, 405, "method_not_allowed", "GET is not for this route; use "),
    ("POST", "/health", {}, 405, "method_not_allowed", "use "),
    ("POST", "/v1/completions", {}, 415, "unsupported_media_type", "Content-Type is missing; send JSON and say so"),
    (
        "POST",
        "/v1/completions",
        {"data": {"prompt": "hi"}},
        415,
        "unsupported_media_type",
        "Content-Type is application/x-www-form-urlencoded; send JSON and say so (curl: -H 'Content-Type: application/",
    ),
    ("POST", "/generate", {"data": "hi", "content_type": "text/plain"}, 415, "unsupported_media_type", "or a form"),
    (
        "POST",
        "/v1/completions",
        {"json": ASK, "headers": {"Content-Encoding": "gzip"}},
        415,
        "unsupported_media_type",
        "compressed",
    ),
    ("POST", "/v1/completions", {"data": "{", "content_type": "application/json"}, 400, "invalid_json", "not JSON"),
    ("POST", "/v1/completions", {"json": {"promt": "a"}}, 400, "unknown_field", "did you mean prompt?"),
    (
        "POST",
        "/v1/completions",
        {"data": b"x" * (MAX_BODY + 1), "content_type": "application/json"},
        413,
        "payload_too_large",
        "longer than 8388608 bytes",
    ),
    ("POST", "/generate", {"data": {"prefix": "x" * MAX_BODY, "length": "1"}}, 413, "payload_too_large", "longer"),
]


@pytest.mark.parametrize(("method", "path", "how", "status", "code", "says"), BAD_REQUESTS)
def test_what_cannot_be_served_is_refused_in_json(
    method: str, path: str, how: dict[str, Any], status: int, code: str, says: str, client: FlaskClient
) -> None:
    answer = client.open(path, method=method, **how)
    assert (answer.status_code, answer.mimetype) == (status, "application/json")
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["code"] == code
    assert says in answer.json["error"]["message"]
    if status == 405:
        assert "OPTIONS" in answer.headers["Allow"]


@pytest.mark.parametrize("sent", ["application/json; charset=utf-8", "application/vnd.api+json", "APPLICATION/JSON"])
def test_json_is_json_under_any_of_its_names(sent: str, client: FlaskClient) -> None:
    assert client.post("/completions", data='{"prompt": "a"}', content_type=sent).status_code == 200


def test_head_and_options_are_answered_without_a_body(client: FlaskClient) -> None:
    for path in ("/", "/health", "/v1/models"):
        answer = client.head(path)
        assert (answer.status_code, answer.data) == (200, b"")
    answer = client.options("/v1/completions")
    assert (answer.status_code, answer.data) == (200, b"")
    assert set(answer.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("given", ["abc-1.2_3:4", "x" * 128])
def test_a_clients_request_id_comes_back(given: str, client: FlaskClient) -> None:
    assert client.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given
    assert client.get("/nowhere", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "a b", "<script>", "x" * 129, "é", "a\tb"])
def test_a_request_id_of_odd_letters_is_replaced(given: str, client: FlaskClient) -> None:
    made = client.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_one_line_of_log_tells_a_request_and_not_its_prompt(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"prompt": ["a secret", "x"], "max_tokens": 4, "n": 2}
    client.post("/v2/engines/a/completions", json=body, headers={"X-Request-Id": "r1"})
    client.get("/health")
    (line,) = caplog.messages
    assert re.fullmatch(
        r"r1 POST /v2/engines/<path:engine>/completions 200 \d+\.\d{3} s "
        r"cmpl-[0-9a-f]{32} prompts=2 n=2 in=9 out=16 reason=length",
        line,
    )
    caplog.clear()
    client.post("/v1/completions", json={"prompt": "a secret", "m\nax": 1}, headers={"X-Request-Id": "r2"})
    client.get("/no\nwhere", headers={"X-Request-Id": "r3"})
    assert [re.sub(r"\d+\.\d{3} s", "T", m) for m in caplog.messages] == [
        "r2 POST /v1/completions 400 T unknown_field",
        "r3 GET (no route) 404 T not_found",
    ]


def test_the_server_serves_without_torch() -> None:
    code = "import sys, metaseq_api.server.app, metaseq_api.server.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_guard_can_be_added_in_front_of_every_route(app: Flask) -> None:
    @app.before_request
    def refuse() -> None:
        raise errors.NotAuthorized("no key; send Authorization: Bearer KEY")

    for path in ("/", "/health", "/nowhere"):
        answer = app.test_client().get(path)
        assert (answer.status_code, answer.json["error"]["code"]) == (401, "invalid_api_key")


def test_an_engine_that_is_full_says_so_with_a_time_to_come_back(client: FlaskClient, engine: FakeEngine) -> None:
    engine.fail_with = Overloaded("4096 sequences wait already; try again later")
    answer = client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    engine.fail_with = EngineStopped("gone")
    assert client.post("/v1/completions", json=ASK).headers["Retry-After"] == "5"


# A body no test above thought of: any JSON under any field, and fields that are nearly right.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 2),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
NAMES = st.sampled_from(sorted(schema.COMPLETION_FIELDS | schema.GENERATE_FIELDS)) | st.text(max_size=10)
BODIES = st.dictionaries(NAMES, VALUES, max_size=6) | st.fixed_dictionaries(
    {"prompt": st.text(max_size=6) | st.lists(st.integers(0, 259), min_size=1, max_size=4)},
    optional=dict.fromkeys(params.READERS, SCALARS),
)


@given(body=BODIES, path=st.sampled_from(["/v1/completions", "/generate"]))
@example(body={"prompt": "a", "stop": "b", "n": 4, "best_of": 4, "logprobs": 100}, path="/v1/completions")
@hypothesis_settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_body_whatever_makes_a_500(client: FlaskClient, body: dict[str, Any], path: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json["error"]["message"]
    else:
        assert answer.json.get("choices") or answer.json["result"] == "success"


@given(raw=st.binary(max_size=60), path=st.sampled_from(["/v1/completions", "/generate", "/", "/health"]))
@hypothesis_settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_bytes_whatever_make_a_500(client: FlaskClient, raw: bytes, path: str) -> None:
    for sent in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post(path, data=raw, content_type=sent)
        assert answer.status_code in (400, 405, 415), answer.text
        assert answer.json["error"]["code"]
