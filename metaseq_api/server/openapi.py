"""/openapi.json: what the routes take and answer, as an OpenAPI 3.1 document.

Fields of bodies, their types and ranges come from the tables that read them (`params`, `schema`, `chat`, `tokens`,
`core.request`); what the answers look like is in `openapi_answers`, and a test holds both against the running app.
What a schema cannot say (min_tokens is at most max_tokens, the window) is answered 400 with the field's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metaseq_api import __version__
from metaseq_api.core import EngineProtocol
from metaseq_api.core.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOP_LEN,
    MAX_STOP_TOKEN_IDS,
    RANGES,
)
from metaseq_api.server import chat, energonai, fields, params, schema, terms, tokens
from metaseq_api.server.openapi_answers import ANSWERS, ERRORS
from metaseq_api.settings import Settings

Schema = dict[str, Any]
_SEED = 2**63
_ABOUT: dict[str, str] = {
    "prompt": "What to continue: a text, texts, token ids, or arrays of these; </s> is put in front.",
    "max_tokens": "Most tokens to generate; /completions: 16 where nothing is said, chat: what the window has left.",
    "min_tokens": "Tokens before which neither </s> nor a stop string ends the text.",
    "temperature": "0 takes the likeliest token.",
    "seed": "The same seed gives the same text.",
    "stop": "Strings that end the text and are left out of it.",
    "ignore_eos": "Never choose </s>, so that exactly max_tokens come.",
    "logprobs": "Alternatives told at each token; chat: whether to tell log-probabilities.",
    "stream": "Answer as server-sent events.",
    "top_k": "Choose among so many; -1, 0 and null mean all. /logprobs: how many to tell.",
    "model": "Any name: one service serves one model.",
    "user": "Goes to the log.",
    "messages": "The conversation so far.",
    "cache_id": "A UUID, given back as it came.",
    "suffix": "Not offered: OPT continues a text.",
}


def document(engine: EngineProtocol, settings: Settings) -> Schema:
    """The whole document."""
    token_id = {"type": "integer", "minimum": 0, "maximum": engine.vocab_size - 1}
    bodies = {
        "CompletionRequest": _completion(token_id, settings),
        "GenerateRequest": _generate(token_id, settings),
        "GenerationRequest": _generation(),
        "ChatRequest": _chat(token_id, settings),
        "LogprobsRequest": _object(
            {
                "model": _text(),
                "prompt": _prompt(token_id),
                "top_k": _range("integer", 1, MAX_LOGPROBS),
                "cache_id": _or_null({"type": "string", "format": "uuid"}),
            },
            "prompt",
        ),
        "TokenizeRequest": _object(
            {n: _of_reader(n, r) for n, r in tokens.TOKENIZE.items()} | {"prompt": _string()}, "prompt"
        ),
        "DetokenizeRequest": _object({"model": _text(), "tokens": {"type": "array", "items": token_id}}, "tokens"),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "metaseq-api",
            "version": __version__,
            "description": f"Completions of {engine.model_name}, a window of {engine.max_seq_len} tokens.",
        },
        "paths": _paths(engine),
        "components": {"schemas": {**bodies, **ANSWERS}},
    }


def _paths(engine: EngineProtocol) -> Schema:
    hello = {"prompt": "Hello", "max_tokens": 4}
    completion = _post("Continue prompts", "CompletionRequest", "Completion", hello, streams=True)
    talk = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    chat_operation = _post("Answer in a conversation", "ChatRequest", "ChatCompletion", talk, streams=True)
    generate = _post(
        "Exactly `length` tokens (metaseq's first API)",
        "GenerateRequest",
        "Generated",
        {"prefix": "Hello", "length": 4},
    )
    return {
        "/v1/completions": {"post": completion},
        "/completions": {"post": completion},
        "/v1/chat/completions": {"post": chat_operation},
        "/generate": {"post": generate},
        "/generation": {
            "post": _post(
                "One text (EnergonAI's API)", "GenerationRequest", "Continued", {"prompt": "A", "max_tokens": 4}
            )
        },
        "/logprobs": {
            "post": _post(
                "The likeliest next tokens (Alpa's API)", "LogprobsRequest", "Logprobs", {"prompt": "Hello", "top_k": 4}
            )
        },
        "/tokenize": {"post": _post("Token ids of a text", "TokenizeRequest", "Tokens", {"prompt": "Hello"})},
        "/detokenize": {"post": _post("The text of token ids", "DetokenizeRequest", "Text", {"tokens": [4]})},
        "/tokenizer_info": {"get": _get("The tokenizer's special tokens and the chat template", "TokenizerInfo")},
        "/v1/models": {"get": _get("The one model", "ModelList")},
        "/v1/models/{model}": {
            "get": _get("One model", "Model", 404)
            | {
                "parameters": [
                    {
                        "name": "model",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string", "minLength": 1},
                        "example": engine.model_name,
                    }
                ]
            }
        },
        "/health": {"get": _get("200 while every rank is heard of and gets on", "Health", health=True)},
        "/ready": {"get": _get("200 where a request sent now would be begun", "Ready", health=True)},
        "/version": {"get": _get("The version of this server", "Version")},
        "/metrics": {"get": _plain("Prometheus's text format", "text/plain")},
        "/openapi.json": {"get": _get("This document", "Document")},
        "/docs": {"get": _plain("This document as a page", "text/html")},
        "/": {"get": _plain("The playground", "text/html")},
    }


def _completion(token_id: Schema, settings: Settings) -> Schema:
    properties = {name: _of_reader(name, read, token_id) for name, read in params.READERS.items()}
    properties |= _shared(settings) | {
        "prompt": _prompt(token_id),
        "suffix": {"enum": [None, ""]},
        "n": _range("integer", 1, settings.max_beam),
        "best_of": _range("integer", 1, settings.max_beam),
    }
    return _object(properties, "prompt")


def _generate(token_id: Schema, settings: Settings) -> Schema:
    properties = {name: _of_reader(name, params.READERS[name], token_id) for name in params.OF_ONE_SAMPLE}
    shared = {name: of for name, of in _shared(settings).items() if name in schema.GENERATE_FIELDS}
    needed = {"prefix": _string(), "length": {"type": "integer", "minimum": 1}}
    return _object(properties | shared | needed, "prefix", "length")


def _generation() -> Schema:
    properties = {n: _of_reader(n, params.READERS[n]) for n in energonai.FIELDS if n in params.READERS}
    needed = {"prompt": _string(), "max_tokens": {"type": "integer", "minimum": 0}}
    return _object(properties | needed, "prompt", "max_tokens")


def _chat(token_id: Schema, settings: Settings) -> Schema:
    properties = {n: of for n, of in _completion(token_id, settings)["properties"].items() if n in chat.PASSED}
    properties |= {name: _of_reader(name, read) for name, read in chat.OWN.items()}
    properties |= {name: {"enum": [None, *values]} for name, (values, _) in chat.NEUTRAL.items()}
    part = _object({"type": {"const": "text"}, "text": _string()}, "type", "text")
    message = _object(
        {
            "role": {"enum": list(chat.ROLES)},
            "content": {"anyOf": [_string(), {"type": "array", "items": part | {"additionalProperties": True}}]},
            "name": _text(),
        },
        "role",
        "content",
    )
    properties |= {
        "messages": {"type": "array", "minItems": 1, "maxItems": chat.MAX_MESSAGES, "items": message},
        "max_tokens": _range("integer", 1, None),
        "max_completion_tokens": _range("integer", 1, None),
        "top_logprobs": _range("integer", 0, chat.MAX_TOP_LOGPROBS),
    }
    for inner in message["properties"].values():
        inner.pop("description", None)
    message["additionalProperties"] = {"enum": [None, []]}
    return _object(properties, "messages")


def _shared(settings: Settings) -> Schema:
    """Fields that say nothing of how to continue."""
    known: Schema = {
        "model": _text(),
        "user": _text(schema.MAX_USER_LEN),
        **{name: {"enum": [None, ""]} for name in schema.ALPA_KEYS},
        "stream": _flag(),
        "stream_options": _or_null(_object({"include_usage": _flag()})),
        "timeout_ms": _range("integer", 1, round(1000 * terms.longest_s(settings.request_timeout_s))),
        "priority": _range("integer", -terms.MAX_PRIORITY, terms.MAX_PRIORITY),
    }
    return {n: of for n, of in known.items() if n in schema.COMPLETION_FIELDS}


def _of_reader(name: str, read: Callable[..., Any], token_id: Schema | None = None) -> Schema:
    """What a field's own reader takes, within the range that SamplingParams has."""
    low, high = RANGES.get(name, (None, None))
    low = None if name in params.OFF_BELOW else low
    token_id = token_id or {"type": "integer"}
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LEN}
    stops = {"type": "array", "items": stop, "maxItems": MAX_STOP}
    biases = {
        "type": "object",
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
    if read is fields.integer and low is None:
        low, high = {
            "seed": (-_SEED, _SEED - 1),
            "max_tokens": (0, None),
            "min_tokens": (0, None),
            "top_k": (-1, None),
        }.get(name, (None, None))
    makers: dict[Callable[..., Any], Schema] = {
        fields.integer: _range("integer", low, high),
        fields.number: _range("number", low, high),
        fields.flag: _flag(),
        fields.text: _text(),
        fields.strings: {"anyOf": [{"type": "null"}, stop, stops]},
        fields.integers: {"type": ["array", "null"], "items": token_id, "maxItems": MAX_STOP_TOKEN_IDS},
        fields.biases: _or_null(biases),
    }
    return makers[read]


def _prompt(token_id: Schema) -> Schema:
    ids = {"type": "array", "items": token_id, "minItems": 1}
    many = {"type": "array", "minItems": 1, "maxItems": schema.MAX_PROMPTS}
    return {"anyOf": [_string(), ids, many | {"items": _string()}, many | {"items": ids}]}


def _object(properties: Mapping[str, Schema], *required: str) -> Schema:
    described = {n: of | ({"description": _ABOUT[n]} if n in _ABOUT else {}) for n, of in sorted(properties.items())}
    return {
        "type": "object",
        "properties": described,
        "required": list(required),
        "additionalProperties": False,
    }


def _string() -> Schema:
    return {"type": "string"}


def _text(most: int | None = None) -> Schema:
    return {"type": ["string", "null"]} | ({} if most is None else {"maxLength": most})


def _flag() -> Schema:
    return {"type": ["boolean", "null"]}


def _range(kind: str, low: float | None, high: float | None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": [kind, "null"]} | {name: bound for name, bound in bounds.items() if bound is not None}


def _or_null(of: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, of]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _errors(*statuses: int) -> Schema:
    return {str(status): {"description": ERRORS[status], "content": _json("Error")} for status in statuses}


def _get(summary: str, answer: str, *errors: int, health: bool = False) -> Schema:
    responses = {"200": {"description": "Found", "content": _json(answer)}} | _errors(*errors)
    if health:
        responses["503"] = {"description": "It is not so", "content": _json(answer)}
    return {"summary": summary, "responses": responses}


def _plain(summary: str, kind: str) -> Schema:
    return {
        "summary": summary,
        "responses": {"200": {"description": "Found", "content": {kind: {"schema": _string()}}}},
    }


def _post(summary: str, body: str, answer: str, example: Schema, *, streams: bool = False) -> Schema:
    content = _json(answer) | ({"text/event-stream": {"schema": _string()}} if streams else {})
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(body), "example": example}},
        },
        "responses": {"200": {"description": "The answer", "content": content}}
        | _errors(400, 401, 403, 413, 415, 429, 503, 504),
    }
