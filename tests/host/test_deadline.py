"""timeout_ms through HTTP and a real engine: a request out of time is answered, and its blocks are free."""

from __future__ import annotations

from pathlib import Path

from support.engines import running_engine, slow_down
from support.processes import until

from metaseq_api.core import Request, SamplingParams
from metaseq_api.server.app import create_app
from metaseq_api.settings import Settings

LONG = {"prompt": "return", "max_tokens": 80, "n": 8, "ignore_eos": True}


def test_a_running_request_out_of_time_is_504_and_its_blocks_are_free_at_once(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        client = create_app(engine, Settings()).test_client()
        answer = client.post("/v1/completions", json={**LONG, "timeout_ms": 1})
        assert (answer.status_code, answer.json["error"]["code"]) == (504, "deadline_exceeded")
        until(lambda: engine.health().num_free_blocks == engine.health().num_blocks, "the blocks")
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "timeout_ms": 60000})
        assert answer.status_code == 200


def test_one_that_only_waits_is_given_up_in_its_time_too(tmp_path: Path) -> None:
    with running_engine(tmp_path, max_batch_size=1) as engine:
        slow_down(engine)
        client = create_app(engine, Settings()).test_client()
        ids = tuple(engine.encode("return"))
        params = SamplingParams(max_tokens=80, n=8, ignore_eos=True)
        first = engine.submit(Request(request_id="first", prompts=(ids,), params=params))
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "timeout_ms": 1})
        assert answer.status_code == 504
        assert len(first.result(30)) == 8


def test_a_full_queue_sends_clients_away_for_as_long_as_the_engine_needs(tmp_path: Path) -> None:
    with running_engine(tmp_path, max_queue=8) as engine:
        slow_down(engine)
        client = create_app(engine, Settings()).test_client()
        ids = tuple(engine.encode("return"))
        params = SamplingParams(max_tokens=80, n=8, ignore_eos=True)
        ticket = engine.submit(Request(request_id="first", prompts=(ids,), params=params))
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert (answer.status_code, answer.json["error"]["code"]) == (429, "overloaded")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        ticket.cancel()
