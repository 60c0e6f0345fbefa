"""Models, health, readiness, tokens and Alpa's next-token route, against the fake engine."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.fake_engine import FakeEngine

from metaseq_api import __version__
from metaseq_api.server.app import CLOSING


def post(client: FlaskClient, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json


def test_one_model_is_found_by_its_name_alone(client: FlaskClient) -> None:
    (listed,) = client.get("/v1/models").json["data"]
    assert client.get("/v1/models/fake").json == listed
    for other in ("gpt-4", "facebook/opt-125m"):
        answer = client.get(f"/v1/models/{other}")
        assert (answer.status_code, answer.json["error"]["code"]) == (404, "model_not_found")


def test_the_version_is_the_packages(client: FlaskClient) -> None:
    assert client.get("/version").json == {"version": __version__}


def test_health_tells_stuck_from_stopped(client: FlaskClient, engine: FakeEngine) -> None:
    engine.stuck = "rank 3 not heard of for 20 s"
    answer = client.get("/health")
    assert (answer.status_code, answer.json["status"], answer.json["reason"]) == (503, "stuck", engine.stuck)
    engine.stopped = "gone"
    assert client.get("/health").json["status"] == "stopped"


def test_ready_is_503_while_loading_stuck_or_draining(client: FlaskClient, engine: FakeEngine, app: Flask) -> None:
    assert (client.get("/ready").status_code, client.get("/ready").json) == (200, {"ready": True})
    engine.ready = False
    assert (client.get("/ready").status_code, client.get("/ready").json) == (503, {"ready": False})
    engine.ready, engine.stuck = True, "rank 1"
    assert client.get("/ready").status_code == 503
    engine.stuck = ""
    app.extensions[CLOSING].set()
    assert client.get("/ready").status_code == 503


def test_tokens_go_there_and_back(client: FlaskClient) -> None:
    got = post(client, "/tokenize", prompt="hé")
    assert got == {"count": 4, "max_model_len": 64, "tokens": [2, 108, 199, 173], "token_strs": None}
    bare = post(client, "/tokenize", prompt="hé", add_special_tokens=False, return_token_strs=True)
    assert (bare["tokens"], bare["token_strs"][0]) == ([108, 199, 173], "h")
    assert post(client, "/detokenize", tokens=bare["tokens"], model="any") == {"prompt": "hé"}
    assert post(client, "/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert post(client, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"prompt": "x" * 20000}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [5] * 2000}, "tokens"),
        ("/logprobs", {}, "prompt"),
        ("/logprobs", {"prompt": "a", "top_k": 0}, "top_k"),
        ("/logprobs", {"prompt": "a", "top_k": 101}, "top_k"),
        ("/logprobs", {"prompt": "a", "cache_id": "mine"}, "cache_id"),
        ("/logprobs", {"prompt": "a", "topk": 3}, "topk"),
        ("/logprobs", {"prompt": [5] * 64}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(path: str, body: dict[str, Any], param: str, client: FlaskClient) -> None:
    assert post(client, path, 400, **body)["error"]["param"] == param


def test_the_tokenizer_is_described_as_lm_eval_reads_it(client: FlaskClient) -> None:
    got = client.get("/tokenizer_info").json
    assert {got[name] for name in ("bos_token", "eos_token")} == {"</s>"}
    assert "Assistant:" in got["chat_template"]


def test_alpas_route_tells_the_likeliest_next_tokens_of_each_prompt(client: FlaskClient, engine: FakeEngine) -> None:
    got = post(client, "/logprobs", prompt=[[5, 6], [7, 8]], top_k=3)
    assert got["indices"] == [[5, 6, 7]] * 2
    assert got["logprobs"] == [[0.0, -1.0, -2.0]] * 2
    (request,) = engine.requests
    assert (request.params.max_tokens, request.params.greedy, request.params.logprobs) == (1, True, 3)
    assert str(uuid.UUID(got["cache_id"])) == got["cache_id"]
    again = post(client, "/logprobs", prompt=[[5, 6, 9], [7, 8, 9]], top_k=3, cache_id=got["cache_id"])
    assert again["cache_id"] == got["cache_id"]
    assert len(post(client, "/logprobs", prompt="hi")["indices"][0]) == 50


def test_the_docs_page_holds_every_route_and_nothing_from_elsewhere(client: FlaskClient) -> None:
    answer = client.get("/docs")
    assert answer.mimetype == "text/html"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "<script" not in answer.text
    assert "://" not in answer.text
    for path in client.get("/openapi.json").json["paths"]:
        assert path in answer.text
