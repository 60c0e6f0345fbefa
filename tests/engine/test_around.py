"""The real engine behind the routes around completions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import ask, running_engine, tiny_model
from support.processes import until

from metaseq_api.core import Request, SamplingParams
from metaseq_api.server.app import create_app
from metaseq_api.settings import Settings

PROMPT = [40 + i % 90 for i in range(41)]


def test_alpas_route_gives_the_models_own_next_tokens_and_growing_prompts_are_found(tmp_path: Path) -> None:
    hf, ids = tiny_model(), list(PROMPT)
    with running_engine(tmp_path) as engine:
        client = create_app(engine, Settings()).test_client()
        answer = client.post("/logprobs", json={"prompt": ids, "top_k": 7})
        for _ in range(4):
            got = answer.json
            with torch.inference_mode():
                want = hf(torch.tensor([[2, *ids]])).logits[0, -1].log_softmax(-1).topk(7)
            assert got["indices"] == [want.indices.tolist()]
            assert got["logprobs"][0] == pytest.approx(want.values.tolist(), abs=1e-4)
            ids.append(got["indices"][0][0])
            body = {"prompt": ids, "top_k": 7, "cache_id": got["cache_id"]}
            answer = client.post("/logprobs", json=body)
        stats = engine.stats
        assert stats.prefix_hits == 4 * 40, "of 42 to 46 tokens five whole blocks of eight are found"
        assert stats.generation_tokens == stats.finished["length"] + stats.finished["stop"] == 5


def test_the_engine_counts_what_it_did(tmp_path: Path) -> None:
    with running_engine(tmp_path, num_blocks=8) as engine:
        ask(engine, PROMPT[:10], PROMPT[:6], max_tokens=5, n=2, ignore_eos=True)
        ask(engine, PROMPT[:3], max_tokens=0, echo=True)
        ticket = engine.submit(Request(request_id="x", prompts=((5,),), params=SamplingParams(max_tokens=60)))
        ticket.cancel()
        ask(engine, PROMPT[:3], max_tokens=1)
        s = engine.stats
        assert s.prompt_tokens == 10 + 6 + 3 + 1 + 3
        assert s.finished["length"] + s.finished["stop"] == 4 + 1 + 1
        assert s.finished["abort"] <= 1
        assert sum(s.queue_s.counts) <= sum(s.end_to_end_s.counts)
        assert sum(s.first_token_s.counts) >= 5
        assert s.slowest_step_s > 0
        assert not s.num_alive
        until(lambda: engine.health().step_age_s is None, "the last step ended, of which the answer came before")
        health = engine.health()
        assert (health.ready, health.stuck) == (True, False)
    assert not engine.health().ready


def test_a_conversation_is_answered_by_the_model(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        client = create_app(engine, Settings()).test_client()
        messages = [{"role": "user", "content": "the"}]
        body = {"messages": messages, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
        got = client.post("/v1/chat/completions", json=body).json
        (want,) = ask(engine, "User: the\nAssistant:", max_tokens=6, temperature=0, stop=("\nUser:",))
        assert got["choices"][0]["message"]["content"] == want.text.lstrip()
        assert len(got["choices"][0]["logprobs"]["content"]) == want.num_tokens
        events = client.post("/v1/chat/completions", json=body | {"stream": True}).text
        assert events.endswith("data: [DONE]\n\n")
        counted = client.get("/metrics").text
        assert 'metaseq_api:request_success_total{finished_reason="length",model_name="tiny"} 3.0' in counted
