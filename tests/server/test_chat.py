"""Conversations: OpenAI's shapes there and back, each field with its meaning or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from flask.testing import FlaskClient
from support.fake_engine import FakeEngine

from metaseq_api.core import Request, TokenLogprobs
from metaseq_api.errors import SettingsError
from metaseq_api.server import chat, template
from metaseq_api.server.app import create_app
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?", "name": "me"},
]
ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_seq_len=128)


def post(client: FlaskClient, status: int = 200, **body: Any) -> Any:
    answer = client.post("/v1/chat/completions", json={"messages": ASK} | body)
    assert answer.status_code == status, answer.text
    return answer.json


def test_a_conversation_is_lines_of_user_and_assistant(client: FlaskClient, engine: FakeEngine) -> None:
    got = post(client, messages=TALK, max_tokens=3)
    (request,) = engine.requests
    want = "Be brief.\n\nUser: Hi you\nAssistant: Hello\nUser: Who?\nAssistant:"
    assert engine.decode(request.prompts[0]) == want
    assert request.params.stop == ("\nUser:",)
    assert got.pop("id").startswith("chatcmpl-")
    assert got.pop("created") > 0
    assert got == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "abc", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": len(want), "completion_tokens": 3, "total_tokens": len(want) + 3},
    }


def test_fields_reach_the_completion(client: FlaskClient, engine: FakeEngine) -> None:
    post(client, max_completion_tokens=5, n=2, temperature=0, seed=7, stop="x", top_k=3, user="me", store=False)
    request = engine.requests[-1]
    p = request.params
    assert (p.max_tokens, p.n, p.temperature, p.seed, p.top_k, request.user) == (5, 2, 0, 7, 3, "me")
    assert p.stop == ("x", "\nUser:")
    post(client)
    request = engine.requests[-1]
    assert request.params.max_tokens == 127 - len(request.prompts[0]), "all that the window has left"


def test_logprobs_have_their_bytes_and_alternatives() -> None:
    lists = TokenLogprobs(
        tokens=("a", "bytes:\\xe2\\x82"),
        token_logprobs=(-2.0, float("-inf")),
        top_logprobs=({"b": -1.0, "a": -2.0}, {"c": -0.5, "bytes:\\xe2\\x82": float("-inf")}),
        text_offset=(0, 1),
    )
    first, second = chat.render_logprobs(lists, 1)["content"]
    assert first["top_logprobs"] == [{"token": "b", "logprob": -1.0, "bytes": [98]}]
    assert (second["bytes"], second["logprob"]) == ([0xE2, 0x82], -9999.0)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "non-empty"),
        ({"messages": ["hi"]}, "messages", "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "one of system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages", "one of system"),
        ({"messages": [{"role": "user"}]}, "messages", "content is null"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "OPT reads text alone"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "the conversation is"),
        ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages", "shorten it"),
        ({"tools": [{"type": "function"}]}, "tools", "not trained to call tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "hold"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "reason"),
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"prompt": "x"}, "prompt", "no field"),
        ({"echo": True}, "echo", "no field"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 500}, "max_tokens", "at most"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"n": 99}, "n", "MAX_BEAM"),
        ({"stop": [7]}, "stop", "string"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    body: dict[str, Any], param: str, says: str, client: FlaskClient
) -> None:
    error = post(client, 400, **body)["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_openais_client_reads_the_answer_and_the_stream(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        ask: dict[str, Any] = {"model": "fake", "messages": ASK, "max_tokens": 4, "n": 2}
        whole = api.chat.completions.create(**ask, logprobs=True, top_logprobs=1)
        assert [c.message.content for c in whole.choices] == ["abcd", "bcde"]
        assert whole.choices[0].logprobs is not None
        assert [t.token for t in whole.choices[0].logprobs.content or []] == list("abcd")
        chunks = list(api.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    for index, want in ((0, "abcd"), (1, "bcde")):
        parts = [x for c in chunks for x in c.choices if x.index == index]
        assert [p.delta.role for p in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert "".join(p.delta.content or "" for p in parts) == want
        assert [p.finish_reason for p in parts if p.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_the_space_in_front_of_a_streamed_answer_is_left_out(engine: FakeEngine) -> None:
    engine.hold()
    request = Request(request_id="chatcmpl-1", prompts=((5,),), stream=True)
    answer = engine.submit(request)
    stream = chat.ChatStream(
        request,
        answer,
        model="fake",
        created=1,
        include_usage=False,
        explain=lambda error: {},
        on_end=lambda num_tokens, how: None,
    )
    got = []
    for piece in (" ", " Hi", " you"):
        answer.say(piece)
        got.append(json.loads(stream.take().removeprefix(b"data: "))["choices"][0]["delta"])
    assert got == [{"role": "assistant", "content": ""}, {"content": "Hi"}, {"content": " you"}]


def test_a_template_of_ones_own_is_used_and_cannot_reach_out(tmp_path: Path, engine: FakeEngine) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}\n<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    client = create_app(engine, Settings(chat_template=file)).test_client()
    post(client, max_tokens=2)
    assert engine.decode(engine.requests[-1].prompts[0]) == "<user>Hi"
    assert engine.requests[-1].params.stop == ()
    assert "user first" in post(client, 400, messages=TALK)["error"]["message"]
    assert client.get("/tokenizer_info").json["chat_template"] == file.read_text()
    file.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    client = create_app(engine, Settings(chat_template=file)).test_client()
    assert post(client, 400)["error"]["param"] == "messages"


def test_a_template_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    with pytest.raises(SettingsError, match="cannot be read"):
        template.load(file)
    file.write_text("{% for m in messages %}")
    with pytest.raises(SettingsError, match="Jinja2"):
        template.load(file)
