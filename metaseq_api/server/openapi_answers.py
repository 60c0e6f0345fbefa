"""What the routes answer, as JSON schemas: every field, and no other. Does not know what they take (`openapi`)."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

ERRORS = {
    400: "The body cannot be read, or a field is wrong; `param` names it",
    401: "No key, or a wrong one",
    403: "This key or page may not",
    404: "There is no such thing",
    413: "The body is too long",
    415: "The body is no JSON",
    429: "Too much is asked at once; Retry-After says when to come again",
    503: "The server is stopping or has failed",
    504: "The request's time was over",
}


def _object(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_NUMBER_OR_NULL: Schema = {"type": ["number", "null"]}
_FLAG: Schema = {"type": "boolean"}
_REASON: Schema = {"enum": ["stop", "length"]}
_ALTERNATIVES: Schema = {
    "type": ["array", "null"],
    "items": {"type": ["object", "null"], "additionalProperties": _NUMBER},
}
_LOGPROBS: dict[str, Any] = {
    "tokens": _array(_TEXT),
    "token_logprobs": _array(_NUMBER_OR_NULL),
    "text_offset": _array(_COUNT),
    "top_logprobs": _ALTERNATIVES,
}
_RANKED = _object(logprob=_NUMBER, rank={"type": "integer", "minimum": 1}, decoded_token=_TEXT)
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_TOKEN: dict[str, Any] = {
    "token": _TEXT,
    "logprob": _NUMBER,
    "bytes": _array({"type": "integer", "minimum": 0, "maximum": 255}),
}
_MESSAGE = _object(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"})
_MODEL = _object(
    id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len={"type": "integer", "minimum": 1}
)


def _or_null(of: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, of]}


def _answer(kind: str, choice: Schema) -> Schema:
    return _object(id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_array(choice), usage=_USAGE)


ANSWERS: dict[str, Schema] = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT)),
    "Completion": _answer(
        "text_completion",
        _object(
            ("prompt_logprobs",),
            index=_COUNT,
            text=_TEXT,
            # with --metaseq-compat a finish_reason stands in it too
            logprobs=_or_null(_object(("finish_reason",), **_LOGPROBS, finish_reason=_REASON)),
            finish_reason=_REASON,
            prompt_logprobs=_array(_or_null({"type": "object", "additionalProperties": _RANKED})),
        ),
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        _object(
            index=_COUNT,
            message=_MESSAGE,
            logprobs=_or_null(
                _object(
                    content=_array(_object(**_TOKEN, top_logprobs=_array(_object(**_TOKEN)))), refusal={"type": "null"}
                )
            ),
            finish_reason=_REASON,
        ),
    ),
    "Continued": _object(text=_TEXT),
    "Generated": _object(
        text=_TEXT,
        tokens=_array(_TEXT),
        text_offset=_array(_COUNT),
        token_scores=_array(_NUMBER_OR_NULL),
        top_logprobs=_ALTERNATIVES,
        prompt=_TEXT,
        result={"const": "success"},
    ),
    "Logprobs": _object(
        cache_id={"type": "string", "format": "uuid"}, logprobs=_array(_array(_NUMBER)), indices=_array(_array(_COUNT))
    ),
    "Tokens": _object(
        count=_COUNT,
        max_model_len=_COUNT,
        tokens=_array(_COUNT),
        token_strs={"type": ["array", "null"], "items": _TEXT},
    ),
    "Text": _object(prompt=_TEXT),
    "TokenizerInfo": _object(
        tokenizer_class=_TEXT,
        bos_token=_TEXT,
        eos_token=_TEXT,
        pad_token=_TEXT,
        unk_token=_TEXT,
        add_bos_token=_FLAG,
        vocab_size=_COUNT,
        model_max_length=_COUNT,
        chat_template=_TEXT,
    ),
    "Model": _MODEL,
    "ModelList": _object(object={"const": "list"}, data=_array(_MODEL)),
    "Health": _object(
        status={"enum": ["ok", "stuck", "stopped"]},
        model=_TEXT,
        alive=_FLAG,
        reason=_TEXT,
        num_running=_COUNT,
        num_waiting=_COUNT,
        num_free_blocks=_COUNT,
        num_blocks=_COUNT,
        rank_age_s=_array(_NUMBER_OR_NULL),
        stuck=_FLAG,
        ready=_FLAG,
        step_age_s=_NUMBER_OR_NULL,
    ),
    "Ready": _object(ready=_FLAG),
    "Version": _object(version=_TEXT),
    "Document": {"type": "object", "required": ["openapi", "info", "paths"]},
}
