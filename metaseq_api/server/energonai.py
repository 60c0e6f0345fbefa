"""EnergonAI's one route, POST /generation, for clients that know no other: five fields in, one text out.

Knows its names: `prompt` and `max_tokens`, both required, `temperature`, `top_p` and `top_k`; and `{"text": ...}` with
the prompt in front. Does not know what they mean (`schema`).
Source: hpcaitech/EnergonAI examples/opt/opt_fastapi.py:17-63. Its bounds (256 tokens, a temperature below 1) are not
kept, nor its 406 for a full queue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from metaseq_api.core import Completion, EngineProtocol, Request
from metaseq_api.errors import RequestError
from metaseq_api.server import fields, schema
from metaseq_api.settings import Settings

FIELDS = frozenset({"prompt", "max_tokens", "temperature", "top_p", "top_k"})


def parse(body: Mapping[str, Any], engine: EngineProtocol, settings: Settings, request_id: str) -> Request:
    """What one client asks of /generation. Raises: RequestError naming the field."""
    fields.refuse_unknown(body, FIELDS)
    for name in ("prompt", "max_tokens"):
        if body.get(name) is None:
            raise RequestError(f"{name} is missing; send prompt (a string) and max_tokens (a whole number)", param=name)
    fields.text("prompt", body["prompt"])
    plain = dataclasses.replace(settings, metaseq_compat=False)
    return schema.parse_completion({**body, "echo": True}, engine, plain, request_id)


def render(completions: Sequence[Completion]) -> dict[str, Any]:
    return {"text": completions[0].text}
