"""/v1/chat/completions: a conversation becomes a prompt, its completion a message, in OpenAI's shapes.

Knows the fields that chat has and completions have not. All others are read as those of /completions (`schema`), and
refused as there. Does not know HTTP, or how a conversation is written as text (`template`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from metaseq_api.core import Completion, Delta, EngineProtocol, Request, TokenLogprobs
from metaseq_api.core.request import BOS_ID
from metaseq_api.errors import RequestError
from metaseq_api.server import fields, schema
from metaseq_api.server.stream import Stream
from metaseq_api.server.template import ChatTemplate
from metaseq_api.settings import Settings

MAX_MESSAGES = 1024
MAX_TOP_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = ("role", "content", "name")
_NOT_OF_CHAT = {"prompt", "suffix", "echo", "best_of", "prompt_logprobs", "logprobs", "max_tokens"}
PASSED = frozenset(schema.COMPLETION_FIELDS - _NOT_OF_CHAT)
"""Fields that mean here what they mean to /completions."""
OWN = {
    "max_tokens": fields.integer,
    "max_completion_tokens": fields.integer,
    "logprobs": fields.flag,
    "top_logprobs": fields.integer,
}
_NO_TOOLS = "OPT was not trained to call tools"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), "nothing here holds a model to a format"),
    "modalities": ((["text"],), "this model writes text alone"),
    "audio": ((), "this model writes text alone"),
    "prediction": ((), "nothing here makes use of it"),
    "reasoning_effort": ((), "OPT does not reason apart from its answer"),
    "store": ((False,), "nothing is stored here"),
    "metadata": (({},), "nothing is stored here"),
    "service_tier": (("auto", "default"), "there is one tier"),
}
"""Fields of OpenAI's that are not offered: the values that ask for nothing, and why others are refused."""
FIELDS = frozenset({"messages", *PASSED, *OWN, *NEUTRAL})


def parse_chat(
    body: Mapping[str, Any], engine: EngineProtocol, settings: Settings, template: ChatTemplate, request_id: str
) -> Request:
    """What one client asks of /v1/chat/completions. Raises: RequestError naming the field."""
    fields.refuse_unknown(body, FIELDS)
    for name, (neutral, reason) in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(x) and value == x for x in neutral):
            says = f"{name} is {fields.found(value)}, and {reason}; leave it out"
            raise RequestError(says, param=name, code="unsupported_field")
    text = template.render(read_messages(body.get("messages")))
    ids = schema.encode_text("messages", text, engine)
    room = engine.max_seq_len - len(ids) - (ids[:1] != (BOS_ID,))
    completion = {name: body[name] for name in PASSED if name in body}
    completion |= {
        "prompt": list(ids) or "",
        "max_tokens": _max_tokens(body, room),
        "logprobs": _logprobs(body),
        "stop": [*fields.strings("stop", body.get("stop") or []), *template.stop],
    }
    try:
        return schema.parse_completion(
            completion, engine, dataclasses.replace(settings, metaseq_compat=False), request_id
        )
    except RequestError as e:
        if e.param == "prompt":
            says = str(e).replace("prompt", "the conversation", 1)
            raise RequestError(says, param="messages", code=e.code) from None
        raise


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages whose contents are strings; parts of text are joined. Raises: RequestError."""
    if value is None:
        raise RequestError('messages are missing; send [{"role": "user", "content": "Hello"}]', param="messages")
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", value, "a non-empty array of messages")
    if len(value) > MAX_MESSAGES:
        raise fields.wrong("messages", value, f"at most {MAX_MESSAGES} messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def render_chat(request: Request, completions: Seq[Completion], *, model: str, created: int) -> dict[str, Any]:
    """The answer, a choice for each sample."""
    return {
        "id": request.request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": c.text.lstrip(), "refusal": None},
                "logprobs": None if c.logprobs is None else render_logprobs(c.logprobs, request.params.logprobs or 0),
                "finish_reason": c.finish_reason.value,
            }
            for index, c in enumerate(completions)
        ],
        "usage": schema.render_usage(completions[0].num_prompt_tokens, sum(c.num_tokens for c in completions)),
    }


def render_logprobs(logprobs: TokenLogprobs, k: int) -> dict[str, Any]:
    """Each token with its `k` alternatives, likeliest first."""
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    entries = []
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=True):
        ranked = sorted((top or {}).items(), key=lambda item: item[1], reverse=True)[:k]
        entry: dict[str, Any] = _token(token, 0.0 if logprob is None else logprob)
        entries.append(entry | {"top_logprobs": [_token(text, at) for text, at in ranked]})
    return {"content": entries, "refusal": None}


class ChatStream(Stream):
    """A running answer as chunks of a message; the first of each choice says whose it is."""

    kind = "chat.completion.chunk"

    def _render(self, delta: Delta) -> str:
        index = delta.prompt_index * self._n + delta.sample_index
        reason = delta.finish_reason
        said: dict[str, Any] = {}
        if index not in self._begun:
            self._begun[index] = False
            said = {"role": "assistant"}
        text = delta.text if self._begun[index] else delta.text.lstrip()
        self._begun[index] |= bool(text)
        if text or said:
            said["content"] = text
        choice = {
            "index": index,
            "delta": said,
            "logprobs": None if delta.logprobs is None else render_logprobs(delta.logprobs, self._num_alternatives),
            "finish_reason": None if reason is None else reason.value,
        }
        self._count(delta)
        return f"{self._head}{json.dumps(choice)}{self._tail}"


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise fields.wrong(where, value, 'an object such as {"role": "user", "content": "Hello"}')
    for name in value:
        if name not in MESSAGE_FIELDS and value[name] not in (None, []):
            says = f"{where} has the field {json.dumps(name[:40])}; a message has {', '.join(MESSAGE_FIELDS)}"
            raise RequestError(says, param="messages", code="unknown_field")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise fields.wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    message = {"role": "system" if role == "developer" else role, "content": _content(f"{where}.content", value)}
    if value.get("name") is not None:
        message["name"] = fields.text(f"{where}.name", value["name"])
    return message


def _content(where: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return fields.text(where, content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise fields.wrong(
                f"{where}[{i}]", part, 'a part such as {"type": "text", "text": "..."}; OPT reads text alone'
            )
        texts.append(fields.text(f"{where}[{i}].text", part.get("text")))
    return "".join(texts)


def _max_tokens(body: Mapping[str, Any], room: int) -> int:
    """What was asked for under either name; else all that the window has left."""
    given = {
        fields.integer(name, body[name])
        for name in ("max_tokens", "max_completion_tokens")
        if body.get(name) is not None
    }
    if len(given) > 1:
        says = "max_tokens and max_completion_tokens differ; send one of them"
        raise RequestError(says, param="max_completion_tokens")
    asked = given.pop() if given else max(room, 1)
    if asked < 1:
        raise fields.wrong(
            "max_tokens" if body.get("max_tokens") is not None else "max_completion_tokens", asked, "1 or more"
        )
    return asked


def _logprobs(body: Mapping[str, Any]) -> int | None:
    wanted = body.get("logprobs") is not None and fields.flag("logprobs", body["logprobs"])
    if body.get("top_logprobs") is None:
        return 0 if wanted else None
    top = fields.integer("top_logprobs", body["top_logprobs"])
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise fields.wrong("top_logprobs", top, f"between 0 and {MAX_TOP_LOGPROBS}")
    if not wanted:
        raise RequestError("top_logprobs is for logprobs; send it with logprobs true", param="top_logprobs")
    return top


def _token(text: str, logprob: float) -> dict[str, Any]:
    if text.startswith("bytes:\\x"):
        raw = bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
    else:
        raw = text.encode()
    return {"token": text, "logprob": schema.finite(logprob), "bytes": list(raw)}
