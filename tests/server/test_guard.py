"""Who is let in, what a key may use, how long a request may take, and which pages may call: through the whole app."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from flask.testing import FlaskClient
from support.fake_engine import FakeEngine

from metaseq_api.errors import Overloaded
from metaseq_api.server.app import COMPLETION_PATHS, create_app
from metaseq_api.server.guard import Guard
from metaseq_api.server.key_file import Key, change_keys, make_key, new_secret
from metaseq_api.server.keys import Keyring
from metaseq_api.server.port import bind
from metaseq_api.server.quota import Quotas
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings

ASK = {"prompt": "hi", "max_tokens": 4}
SECRET, OTHER, OLD = (new_secret() for _ in range(3))
ALICE = {"Authorization": f"Bearer {SECRET}"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def guarded(
    engine: FakeEngine, tmp_path: Path, clock: Clock | None = None, settings: Settings | None = None, **limits: Any
) -> FlaskClient:
    """A client of an app with the keys of alice (with `limits`), bob, and carol's, which has expired."""
    path = tmp_path / "keys.jsonl"
    keys: list[Key] = [
        make_key("alice", SECRET, **limits),
        make_key("bob", OTHER, weight=7.0),
        make_key("carol", OLD, expires=1.0),
    ]
    change_keys(path, lambda _: keys)
    chosen = settings or Settings(max_beam=4, max_queue=100)
    guard = Guard(chosen, keyring=Keyring(path), quotas=Quotas(clock or time.monotonic))
    return create_app(engine, chosen, guard=guard).test_client()


# keys


@pytest.mark.parametrize(
    "headers",
    [
        ALICE,
        {"Authorization": f"bearer  {SECRET} "},
        {"X-API-Key": SECRET},
        {"api-key": SECRET},
        {"Authorization": "Basic dTpw", "X-API-Key": SECRET},
        {"Authorization": "Bearer ", "X-API-Key": SECRET},
    ],
)
def test_a_key_is_taken_from_any_of_its_headers(headers: dict[str, str], engine: FakeEngine, tmp_path: Path) -> None:
    assert guarded(engine, tmp_path).post("/v1/completions", json=ASK, headers=headers).status_code == 200
    assert engine.requests[-1].tenant == "alice"


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "no API key was sent"),
        ({"Authorization": "Bearer "}, "no API key was sent"),
        ({"Authorization": SECRET}, "no API key was sent"),
        ({"Authorization": "Bearer msk-wrong-and-secret"}, "not known here"),
        ({"Authorization": f"Bearer {SECRET}x"}, "not known here"),
        ({"Authorization": f"Bearer {SECRET[:-1]}"}, "not known here"),
        ({"Authorization": f"Basic {SECRET}"}, "no API key was sent"),
        ({"X-API-Key": "é"}, "not known here"),
        ({"Authorization": f"Bearer {OLD}"}, "has expired"),
    ],
)
def test_without_a_good_key_nobody_is_let_in(
    headers: dict[str, str], says: str, engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = guarded(engine, tmp_path).post("/v1/completions", json=ASK, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="metaseq-api"'
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("authentication_error", "invalid_api_key")
    assert says in answer.json["error"]["message"]
    assert engine.requests == []
    assert "msk-" not in answer.text + caplog.text


def test_every_route_but_the_page_and_health_asks_for_a_key(engine: FakeEngine, tmp_path: Path) -> None:
    client = guarded(engine, tmp_path)
    open_to_all = set()
    for rule in client.application.url_map.iter_rules():
        for method in rule.methods or ():
            path = rule.rule.replace("<path:engine>", "x")
            if method != "OPTIONS" and client.open(path, method=method).status_code != 401:
                open_to_all.add(rule.rule)
    assert open_to_all <= {"/", "/health", "/ready", "/metrics"}
    for path in ("/nowhere", "/health/x", "/v1//models", "/v1/completions/", "/health/../v1/models", "/%2e/v1/models"):
        assert client.get(path).status_code == 401, path
    for path in COMPLETION_PATHS:
        assert client.post(path.replace("<path:engine>", "x"), json=ASK).status_code == 401
    assert client.get("/health/").status_code == 200
    assert client.get("/v1/models", headers=ALICE).status_code == 200
    assert client.get("/nowhere", headers=ALICE).status_code == 404
    assert client.options("/v1/completions").headers["Allow"]


def test_metrics_are_open_unless_the_operator_closes_them(engine: FakeEngine, tmp_path: Path) -> None:
    for settings, status in ((Settings(), 200), (Settings(guard_metrics=True), 401)):
        assert guarded(engine, tmp_path, settings=settings).get("/metrics").status_code == status


def test_without_keys_any_key_or_none_will_do(client: FlaskClient, engine: FakeEngine) -> None:
    for headers in ({}, {"Authorization": "Bearer "}, ALICE):
        answer = client.post("/v1/completions", json=ASK, headers=headers)
        assert answer.status_code == 200
        assert not [name for name in answer.headers.keys() if name.startswith("x-ratelimit")]  # noqa: SIM118
    assert {r.tenant for r in engine.requests} == {""}


def test_the_one_key_of_the_settings_lets_in(engine: FakeEngine) -> None:
    client = create_app(engine, Settings(api_key=SECRET)).test_client()
    assert client.post("/v1/completions", json=ASK).status_code == 401
    assert client.post("/v1/completions", json=ASK, headers=ALICE).status_code == 200


def test_the_log_tells_whose_request_it_was(
    engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    guarded(engine, tmp_path).post("/v1/completions", json=ASK, headers=ALICE)
    assert caplog.messages[-1].endswith(" key=alice")


# limits


def test_the_engine_is_told_whose_it_is_and_how_urgent(engine: FakeEngine, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {OTHER}"}
    client = guarded(engine, tmp_path)
    for path, body in (("/v1/completions", ASK), ("/generate", {"prefix": "a", "length": 2})):
        assert client.post(path, json={**body, "priority": -3}, headers=headers).status_code == 200
        request = engine.requests[-1]
        assert (request.tenant, request.weight, request.priority, request.deadline_s) == ("bob", 7.0, -3, None)


def test_requests_a_minute_are_429_with_the_time_to_wait(engine: FakeEngine, tmp_path: Path, clock: Clock) -> None:
    client = guarded(engine, tmp_path, clock, requests_per_minute=2)
    for left in "10":
        answer = client.post("/v1/completions", json=ASK, headers=ALICE)
        assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, left)
    answer = client.post("/v1/completions", json=ASK, headers=ALICE)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "30")
    assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert client.get("/v1/models", headers=ALICE).status_code == 200, "looking costs nothing"
    assert client.post("/v1/completions", json=ASK, headers={"X-API-Key": OTHER}).status_code == 200
    clock.now += 30
    assert client.post("/v1/completions", json=ASK, headers=ALICE).status_code == 200


def test_tokens_are_charged_at_their_most_and_given_back_unused(
    engine: FakeEngine, tmp_path: Path, clock: Clock
) -> None:
    client = guarded(engine, tmp_path, clock, tokens_per_minute=40)
    body = {"prompt": "hi", "max_tokens": 30, "stop": "d"}  # comes to 2 + 4
    answer = client.post("/v1/completions", json=body, headers=ALICE)
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (200, "34")
    answer = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 39}, headers=ALICE)
    assert (answer.status_code, answer.json["error"]["code"]) == (429, "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    answer = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 35}, headers=ALICE)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")  # 3 tokens at 40 a minute
    engine.fail_with = RuntimeError("broken")
    assert client.post("/v1/completions", json=body, headers=ALICE).status_code == 500
    engine.fail_with = None
    answer = client.post("/v1/completions", json={"promt": "hi"}, headers=ALICE)
    assert answer.headers["x-ratelimit-remaining-tokens"] == "34", "what failed costs no tokens"


def test_requests_at_once_are_bounded_and_a_failed_one_leaves_its_place(
    engine: FakeEngine, tmp_path: Path, clock: Clock
) -> None:
    client = guarded(engine, tmp_path, clock, concurrency=1)
    for _ in range(3):
        engine.fail_with = RuntimeError("broken")
        assert client.post("/v1/completions", json=ASK, headers=ALICE).status_code == 500
        engine.fail_with = None
        assert client.post("/v1/completions", json=ASK, headers=ALICE).status_code == 200
        engine.hold()
        late = client.post("/v1/completions", json={**ASK, "timeout_ms": 1}, headers=ALICE)
        assert late.status_code == 504
        engine.free.set()


def test_a_full_queue_says_when_there_is_room(client: FlaskClient, engine: FakeEngine) -> None:
    engine.fail_with = Overloaded("full", retry_after_s=12.3)
    answer = client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "13")


# deadlines


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_request_out_of_time_is_504_and_is_given_up(path: str, client: FlaskClient, engine: FakeEngine) -> None:
    engine.hold()
    body = ASK if path != "/generate" else {"prefix": "hi", "length": 3}
    answer = client.post(path, json={**body, "timeout_ms": 5})
    assert answer.status_code == 504
    error = answer.json["error"]
    assert (error["type"], error["param"], error["code"]) == ("timeout_error", "timeout_ms", "deadline_exceeded")
    assert "1 completion(s)" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert engine.answers[0].cancelled.is_set()


def test_a_deadline_that_is_met_changes_nothing_and_the_services_own_is_the_most(engine: FakeEngine) -> None:
    client = create_app(engine, Settings(request_timeout_s=60.0)).test_client()
    before = time.monotonic()
    assert client.post("/v1/completions", json={**ASK, "timeout_ms": 30000}).status_code == 200
    assert client.post("/v1/completions", json=ASK).status_code == 200
    first, second = (r.deadline_s for r in engine.requests)
    assert first is not None
    assert second is not None
    assert before + 30 <= first <= time.monotonic() + 30
    assert before + 60 <= second <= time.monotonic() + 60
    answer = client.post("/v1/completions", json={**ASK, "timeout_ms": 60001})
    assert answer.status_code == 400
    assert "between 1 and 60000 milliseconds" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("timeout_ms", v) for v in (0, -1, 1.5, "5", True, [5], 86400001)]
    + [("priority", v) for v in (101, -101, 0.5, "1", True, {})],
)
def test_a_wrong_term_is_refused_by_its_name(name: str, value: Any, client: FlaskClient, engine: FakeEngine) -> None:
    answer = client.post("/v1/completions", json={**ASK, name: value})
    assert (answer.status_code, answer.json["error"]["param"]) == (400, name)
    assert engine.requests == []


# pages


def preflight(client: FlaskClient, origin: str) -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    return client.options("/v1/completions", headers=headers)


def test_no_page_may_call_unless_asked_for(client: FlaskClient) -> None:
    answer = preflight(client, "https://a.example")
    assert (answer.status_code, answer.data) == (200, b"")
    answer = client.get("/health", headers={"Origin": "https://a.example"})
    assert not [name for name in answer.headers.keys() if name.startswith("Access-Control")]  # noqa: SIM118


def test_a_named_origin_may_call_and_another_may_not(engine: FakeEngine, tmp_path: Path) -> None:
    settings = Settings(cors_origins="https://a.example, http://localhost:3000")
    client = guarded(engine, tmp_path, settings=settings, requests_per_minute=5)
    answer = preflight(client, "https://a.example")
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type, x-stainless-lang"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in answer.headers
    answer = client.post("/v1/completions", json=ASK, headers={**ALICE, "Origin": "http://localhost:3000"})
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "x-ratelimit-remaining-requests" in answer.headers["Access-Control-Expose-Headers"]
    answer = client.post("/v1/completions", json=ASK, headers={"Origin": "https://a.example"})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (401, "https://a.example")
    for stranger in ("https://a.example.evil", "https://a.exampl", "null", "http://a.example"):
        answer = preflight(client, stranger)
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert answer.headers["Vary"] == "Origin"


def test_a_star_lets_any_page_call(engine: FakeEngine) -> None:
    client = create_app(engine, Settings(cors_origins="*")).test_client()
    assert preflight(client, "https://b.example").headers["Access-Control-Allow-Origin"] == "*"
    answer = client.post("/v1/completions", json=ASK, headers={"Origin": "https://b.example"})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, "*")


@pytest.mark.parametrize("wanted", ["a\x00b", "x" * 65, "é", ", ".join(["a"] * 65)])
def test_odd_header_names_are_not_echoed(wanted: str, engine: FakeEngine) -> None:
    client = create_app(engine, Settings(cors_origins="*")).test_client()
    headers = {"Origin": "https://b.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/", headers={**headers, "Access-Control-Request-Headers": wanted})
    assert "Access-Control-Allow-Headers" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:8000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://behind.proxy"}, 200),
        ({"Origin": "http://localhost"}, 200),
        ({}, 200),
    ],
)
def test_where_no_key_is_asked_for_a_foreign_page_cannot_make_a_browser_compute(
    headers: dict[str, str], status: int, client: FlaskClient, engine: FakeEngine
) -> None:
    answer = client.post("/generate", data={"prefix": "hi", "length": "3"}, headers=headers)
    assert answer.status_code == status
    assert len(engine.requests) == (status == 200)
    if status == 403:
        assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("permission_error", "forbidden")
        assert "--cors-origins" in answer.json["error"]["message"]


# openai's client against a real server


@pytest.fixture
def url(engine: FakeEngine, tmp_path: Path) -> Iterator[str]:
    app = guarded(engine, tmp_path, requests_per_minute=60, tokens_per_minute=1000).application
    server = Server(app, bind("127.0.0.1", 0), threads=8)
    server.start()
    yield f"{server.url}/v1"
    engine.free.set()
    server.stop(5)


def test_openais_client_knows_a_wrong_key(url: str) -> None:
    wrong = openai.OpenAI(base_url=url, api_key="msk-wrong", timeout=20)
    with wrong as api, pytest.raises(openai.AuthenticationError, match="not known here"):
        api.completions.create(model="any", prompt="hi")
    with openai.OpenAI(base_url=url, api_key=SECRET, timeout=20) as api:
        assert api.completions.create(model="any", prompt="hi", max_tokens=3).choices[0].text == "abc"


def test_openais_client_knows_a_limit_and_waits_as_told(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    with openai.OpenAI(base_url=url, api_key=SECRET, timeout=20, max_retries=2) as api:
        engine.fail_with = Overloaded("full", retry_after_s=3.4)
        with pytest.raises(openai.RateLimitError) as caught:
            api.completions.create(model="any", prompt="hi")
        assert waits == [4.0, 4.0]
        assert caught.value.response.headers["retry-after"] == "4"
        assert caught.value.code == "overloaded"
        engine.fail_with = None
        waits.clear()
        with pytest.raises(openai.RateLimitError) as caught:
            api.completions.create(model="any", prompt=["hi"] * 40, max_tokens=40)
        assert (caught.value.code, waits) == ("insufficient_quota", [])
        answer = api.completions.with_raw_response.create(model="any", prompt="hi", max_tokens=3)
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"


def test_openais_client_does_not_repeat_a_request_that_ran_out_of_time(url: str, engine: FakeEngine) -> None:
    engine.hold()
    api = openai.OpenAI(base_url=url, api_key=SECRET, timeout=20, max_retries=2)
    with api, pytest.raises(openai.InternalServerError) as caught:
        api.completions.create(model="any", prompt="hi", extra_body={"timeout_ms": 20})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert len(engine.requests) == 1
    assert engine.answers[0].cancelled.is_set()
