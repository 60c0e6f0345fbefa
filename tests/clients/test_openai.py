"""OpenAI's own Python client, today's and 0.28, against a real server and a real engine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types import Completion
from support import old_openai
from support.processes import clean_env, until

if TYPE_CHECKING:
    from clients.conftest import Running

SAME: dict[str, Any] = {"model": "any", "prompt": "the end", "max_tokens": 6, "temperature": 0}
ENDLESS = {"ignore_eos": True}
OLD = Path(os.environ.get("OPENAI_028_PYTHON", Path(sys.prefix) / "openai-0.28/bin/python"))
"""A Python that has openai 0.28, which cannot stand beside today's: `make test-clients` makes it."""


@pytest.fixture
def api(service: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="x", timeout=60) as api:
        yield api


def text_of(chunks: Any) -> str:
    return "".join(c.choices[0].text for c in chunks)


def test_whole_streamed_and_asked_without_threads_the_text_is_one(api: openai.OpenAI, service: Running) -> None:
    whole = api.completions.create(**SAME, extra_body=ENDLESS)
    assert text_of(api.completions.create(**SAME, stream=True, extra_body=ENDLESS)) == whole.choices[0].text

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="x", timeout=60) as client:
            answers = await asyncio.gather(*(client.completions.create(**SAME, extra_body=ENDLESS) for _ in range(8)))
            stream = await client.completions.create(**SAME, stream=True, extra_body=ENDLESS)
            return [*(a.choices[0].text for a in answers), "".join([c.choices[0].text async for c in stream])]

    assert set(asyncio.run(ask())) == {whole.choices[0].text}


def test_samples_echo_stop_and_log_probabilities_fit_together(api: openai.OpenAI) -> None:
    whole = api.completions.create(**(SAME | {"temperature": 1}), n=3, best_of=3, seed=7, echo=True, logprobs=2)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert len({c.text for c in whole.choices}) == 3
    for choice in whole.choices:
        lists = choice.logprobs
        assert lists is not None
        assert lists.tokens is not None
        assert lists.token_logprobs is not None
        assert lists.top_logprobs is not None
        assert lists.text_offset is not None
        assert choice.text.startswith("the end")
        assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset)
        for token, logprob, top, offset in zip(
            lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset, strict=True
        ):
            assert top[token] == logprob
            assert 2 <= len(top) <= 3
            if not token.startswith("bytes:") and token != "</s>":
                assert choice.text[offset:].startswith(token)
    text = whole.choices[0].text[len("the end") :]
    stopped = api.completions.create(**(SAME | {"temperature": 1}), n=3, seed=7, stop=[text[2:4], "never"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.index(text[2:4])], "stop")


def test_a_stream_ends_with_its_usage_where_it_is_asked_for(api: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    *chunks, last = api.completions.create(**SAME, n=2, stream=True, stream_options=options, extra_body=ENDLESS)
    assert {c.choices[0].index for c in chunks} == {0, 1}
    assert all(c.usage is None for c in chunks)
    assert (last.choices, last.usage and last.usage.completion_tokens) == ([], 12)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": 1000}, "max_tokens", "context_length_exceeded"),
        ({"temperature": -1}, "temperature", None),
        ({"n": 99}, "n", None),
        ({"suffix": "x"}, "suffix", "unsupported_field"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_field"),
        ({"stream": True, "n": 1, "best_of": 2}, "best_of", None),
    ],
)
def test_a_mistake_is_a_bad_request_that_names_the_field_and_is_sent_once(
    fields: dict[str, Any], param: str, code: str | None, api: openai.OpenAI, service: Running
) -> None:
    asked = len(service.asked)
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(**(SAME | fields))
    assert caught.value.param == param
    assert code is None or caught.value.code == code
    assert caught.value.request_id
    assert len(service.asked) == asked + 1


def test_a_client_that_runs_out_of_patience_leaves_nothing_behind(service: Running) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0, timeout=0.001) as hurried:
        for _ in range(20):
            with pytest.raises(openai.APITimeoutError):
                hurried.completions.create(**(SAME | {"max_tokens": 80, "n": 4}), extra_body=ENDLESS)
    until(lambda: not service.engine.health().num_running + service.engine.health().num_waiting, "nothing to run")
    assert service.engine.health().num_free_blocks == service.engine.health().num_blocks


def test_a_stream_left_half_way_leaves_nothing_behind(api: openai.OpenAI, service: Running) -> None:
    with api.completions.create(**(SAME | {"max_tokens": 80}), stream=True, extra_body=ENDLESS) as stream:
        assert next(iter(stream)).choices[0].finish_reason is None
    until(lambda: service.engine.health().num_free_blocks == service.engine.health().num_blocks, "every block free")


def test_the_raw_answer_has_the_headers_clients_log(api: openai.OpenAI) -> None:
    raw = api.completions.with_raw_response.create(**SAME)
    assert raw.headers["x-request-id"]
    assert isinstance(raw.parse(), Completion)


def test_the_model_list_names_what_every_name_reaches(api: openai.OpenAI, service: Running) -> None:
    assert [(m.id, m.object) for m in api.models.list()] == [("tiny", "model")]
    elsewhere = openai.OpenAI(base_url=service.url, api_key="x", timeout=60)  # a base without /v1, as for metaseq
    with elsewhere:
        assert elsewhere.completions.create(**SAME).model == "tiny"


@pytest.mark.clients
@pytest.mark.skipif(not OLD.exists(), reason=f"no openai 0.28 at {OLD}: make test-clients installs it")
def test_the_client_of_metaseqs_days_works_by_model_and_by_engine(service: Running, api: openai.OpenAI) -> None:
    done = subprocess.run(
        [str(OLD), old_openai.__file__, service.url], env=clean_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["version"].startswith("0.28.")
    want = api.completions.create(**SAME, extra_body=ENDLESS).choices[0].text
    for way in ("model", "engine", "streamed", "streamed by engine", "async", "metaseq's base"):
        assert said[way] == want, way
    assert all(text.startswith("the end") for text in said["choices"])
    assert (len(said["choices"]), said["offsets"][0], said["models"]) == (2, 0, ["tiny"])
    assert said["usage"] > 4
    assert (said["error"]["param"], said["error"]["code"], said["error"]["status"]) == (
        "max_tokens",
        "context_length_exceeded",
        400,
    )
