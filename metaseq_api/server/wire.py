"""A body in, an answer out: the two things that every route does.

Knows HTTP's headers around JSON. Does not know any route, or any field.
"""

from __future__ import annotations

import json
from typing import Any

import flask
from flask import Response

from metaseq_api.errors import UnsupportedMediaType
from metaseq_api.server import fields


def to_json(body: dict[str, Any], status: int = 200) -> Response:
    """The answer that holds `body`."""
    return Response(json.dumps(body, allow_nan=False), status, mimetype="application/json")


def read_json(other: str = "") -> dict[str, Any]:
    """The body of this request. Raises: UnsupportedMediaType, PayloadTooLarge, RequestError."""
    request = flask.request
    if not request.is_json:
        sent = f"is {request.mimetype[:100]}" if request.mimetype else "is missing"
        raise UnsupportedMediaType(
            f"Content-Type {sent}; send JSON{other} and say so (curl: -H 'Content-Type: application/json')"
        )
    if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("the body is compressed (Content-Encoding); send it as it is")
    return fields.read_json(request.get_data(cache=False))
