"""The routes: what each reads, whom it asks, what it answers; and every error, of any kind, as JSON.

Knows HTTP. Does not know the fields of a body (`schema`), sockets and threads (`run`), the page (`page`), or how
text is made.
The life of a request here: an id, a body, a `core.Request`; when the engine's Answer has come (`later`), JSON and one
line in the log. Who may ask, and how much, is `guard`'s: one more hook on either side.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import flask
from flask import Flask, Response, g
from werkzeug.exceptions import HTTPException

from metaseq_api.core import Completion, EngineProtocol, Request
from metaseq_api.errors import (
    MetaseqApiError,
    MethodNotAllowed,
    NotBegun,
    NotFound,
    PayloadTooLarge,
    RequestError,
    UnsupportedMediaType,
)
from metaseq_api.server import energonai, page, schema
from metaseq_api.server.around import Around
from metaseq_api.server.asker import Asker, ClientGone, explain, line_of
from metaseq_api.server.guard import Guard
from metaseq_api.server.later import App, Later
from metaseq_api.server.stream import Stream
from metaseq_api.server.wire import read_json as _read_json
from metaseq_api.server.wire import to_json as _json
from metaseq_api.settings import Settings

log = logging.getLogger(__name__)

MAX_BODY = 8 << 20
"""Units: bytes."""
CLOSING = "metaseq_api.closing"
"""Key of app.extensions: an Event; once it is set, waiting requests are given up and answered 503."""
AT_ONCE = "metaseq_api.at_once"
"""Key of app.extensions: paths whose views wait for nothing, so that whoever must not wait may run them."""
COMPLETION_PATHS = (
    "/completions",
    "/v1/completions",
    "/v1/engines/<path:engine>/completions",
    "/v2/engines/<path:engine>/completions",
    "/engines/<path:engine>/completions",
)
AT_ONCE_PATHS = (*COMPLETION_PATHS[:2], "/v1/chat/completions", "/chat/completions", "/generate", "/generation")
ELSEWHERE = "X-Retry-Elsewhere"
"""Header by which a proxy in front of several services says that it sends on, by itself, what has status 425: a request
that was not begun here. Any other 503 may have cost a step already, or may even be why a rank was lost."""
TOO_EARLY = 425
RETRY_AFTER = {429: "1", 503: "5", TOO_EARLY: "5"}
"""Units: seconds, by status, where the error itself does not know better."""

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499  # nobody reads it; nginx's number, for the log


def create_app(
    engine: EngineProtocol,
    settings: Settings,
    *,
    clock: Callable[[], float] = time.time,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    guard: Guard | None = None,
) -> Flask:
    """The WSGI application that serves `engine`, guarded as the settings say. Raises: SettingsError."""
    app = App(__name__, static_folder=None, template_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, MAX_FORM_MEMORY_SIZE=MAX_BODY)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    closing = app.extensions[CLOSING] = threading.Event()
    guard = guard or Guard(settings)
    asker = Asker(engine, guard, clock=clock, closing=closing)
    front = _Front(engine, settings, asker, clock, new_id)

    app.before_request(front.begin)
    app.after_request(front.end)
    guard.install(app)
    for error, handler in (
        (MetaseqApiError, front.refused),
        (HTTPException, front.refused_by_flask),
        (ClientGone, lambda _: ("", _CLIENT_GONE)),
        (Exception, front.failed),
    ):
        app.register_error_handler(error, handler)

    app.extensions[AT_ONCE] = frozenset(AT_ONCE_PATHS)
    for path in COMPLETION_PATHS:
        app.add_url_rule(path, f"completions {path}", front.completions, methods=["POST"])
    app.add_url_rule("/generate", "generate", front.generate, methods=["POST"])
    app.add_url_rule("/generation", "generation", front.generation, methods=["POST"])
    app.add_url_rule("/", "page", front.page, methods=["GET"])
    Around(engine, settings, asker, clock=clock, new_id=new_id, closing=closing).install(app)
    return app


class _Front:
    """The views and hooks of one app."""

    def __init__(
        self,
        engine: EngineProtocol,
        settings: Settings,
        asker: Asker,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self.engine, self.settings, self.asker, self.clock, self.new_id = engine, settings, asker, clock, new_id
        self.html = page.read()
        self.content_policy = page.policy(self.html)

    # views

    def completions(self, engine: str | None = None) -> Later:
        """`engine`, a part of some paths, is not looked at: one service serves one model, as metaseq's does."""
        body = _read_json()
        request = schema.parse_completion(body, self.engine, self.settings, f"cmpl-{self.new_id()}")
        request = self.asker.admit(request, body)
        include_usage = schema.wants_usage(body)
        if request.stream:
            return self.asker.stream(request, include_usage, Stream)
        return self.asker.complete(request, functools.partial(self._completed, request))

    def _completed(self, request: Request, completions: list[Completion]) -> dict[str, Any]:
        return schema.render_completion(
            request,
            completions,
            model=self.engine.model_name,
            created=int(self.clock()),
            metaseq_compat=self.settings.metaseq_compat,
        )

    def generate(self) -> Later:
        if flask.request.mimetype in _FORMS:
            if flask.request.files:
                raise RequestError("a file was sent; send prefix and length as plain fields")
            body = schema.form_to_body(flask.request.form.to_dict(flat=False))
        else:
            body = _read_json(" or a form")
        request = self.asker.admit(schema.parse_generate(body, self.engine, f"gen-{self.new_id()}"), body)
        return self.asker.complete(request, lambda completions: schema.render_generate(body["prefix"], completions[0]))

    def generation(self) -> Later:
        body = _read_json()
        request = energonai.parse(body, self.engine, self.settings, f"gen-{self.new_id()}")
        return self.asker.complete(self.asker.admit(request, body), energonai.render)

    def page(self) -> Response:
        headers = {"Content-Security-Policy": self.content_policy, "Cache-Control": "no-cache"}
        return Response(self.html, mimetype="text/html", headers=headers)

    # hooks

    def begin(self) -> None:
        given = flask.request.headers.get("X-Request-Id", "")
        g.http_id = given if _PLAIN_ID.fullmatch(given) else self.new_id()
        g.began = time.monotonic()
        g.said = "-"

    def end(self, response: Response) -> Response:
        response.headers["X-Request-Id"] = g.http_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        if response.status_code in RETRY_AFTER and "x-should-retry" not in response.headers:
            response.headers.setdefault("Retry-After", RETRY_AFTER[response.status_code])
        if g.said is not None:
            line_of(response.status_code)(g.said)
        return response

    # errors

    def refused(self, error: MetaseqApiError) -> Response:
        """What a client did wrong is told; what went wrong here is logged, and answered without detail."""
        if not isinstance(error, RequestError):
            return self._broken(error)
        g.said = error.code
        elsewhere = isinstance(error, NotBegun) and ELSEWHERE in flask.request.headers
        answer = _json(schema.render_error(error), TOO_EARLY if elsewhere else error.status)
        if error.retry_after_s is not None:
            answer.headers["Retry-After"] = str(max(math.ceil(error.retry_after_s), 1))
        if not error.worth_retrying:
            answer.headers["x-should-retry"] = "false"
        return answer

    def refused_by_flask(self, error: HTTPException) -> Response:
        allow = error.get_response().headers.get("Allow")
        answer = self.refused(_translate(error, allow))
        if allow:
            answer.headers["Allow"] = allow
        return answer

    def failed(self, error: Exception) -> Response:
        return self._broken(error)

    def _broken(self, error: Exception) -> Response:
        ours = error if isinstance(error, MetaseqApiError) else MetaseqApiError()
        g.said = ours.code
        answer = _json(explain(g.http_id, error), ours.status)
        answer.headers["x-should-retry"] = "false"  # to openai's client: the same request would fail again
        return answer


def _translate(error: HTTPException, allow: str | None) -> RequestError:
    """An error of flask's own, in our words: werkzeug's are for people in browsers."""
    method, status = flask.request.method, error.code
    if status == 404:
        return NotFound("there is no such route; completions are at POST /v1/completions, the page is at GET /")
    if status == 405:
        return MethodNotAllowed(f"{method[:20]} is not for this route; use {allow or 'another method'}")
    if status == 413:
        return PayloadTooLarge(f"the body is longer than {MAX_BODY} bytes; send fewer prompts at once")
    if status == 415:
        return UnsupportedMediaType("the body has the wrong Content-Type; send application/json")
    return RequestError(f"the request cannot be read ({error.name}); check its headers and body", code="bad_request")
