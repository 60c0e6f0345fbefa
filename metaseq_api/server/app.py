"""The routes: what each reads, whom it asks, what it answers; and every error, of any kind, as JSON.

Knows HTTP. Does not know the fields of a body (`schema`), sockets and threads (`run`), the page (`page`), or how
text is made.
The life of a request here: an id, a body, a `core.Request`, the engine's Answer awaited while the client is still
there, JSON, one line in the log. Who may ask, and how much, is `guard`'s: one more hook on either side.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
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
from metaseq_api.server import energonai, page, schema, terms
from metaseq_api.server.around import Around
from metaseq_api.server.guard import Guard
from metaseq_api.server.stream import Stream, stopping
from metaseq_api.server.wire import read_json as _read_json
from metaseq_api.server.wire import to_json as _json
from metaseq_api.settings import Settings

log = logging.getLogger(__name__)

MAX_BODY = 8 << 20
"""Units: bytes."""
POLL_S = 0.2
"""Units: seconds between looks at whether the client of a running request is still there."""
CLOSING = "metaseq_api.closing"
"""Key of app.extensions: an Event; once it is set, waiting requests are given up and answered 503."""
WHEN_GONE = "metaseq_api.when_gone"
"""Key of a request's environ: have a function called when the client goes away. `channel` puts it there."""
TAKE_OVER = "metaseq_api.take_over"
"""Key of a request's environ: leave a Stream to the server, which sends it after the head of the (empty) answer."""
COMPLETION_PATHS = (
    "/completions",
    "/v1/completions",
    "/v1/engines/<path:engine>/completions",
    "/v2/engines/<path:engine>/completions",
    "/engines/<path:engine>/completions",
)
ELSEWHERE = "X-Retry-Elsewhere"
"""Header by which a proxy in front of several services says that it sends on, by itself, what has status 425: a request
that was not begun here. Any other 503 may have cost a step already, or may even be why a rank was lost."""
TOO_EARLY = 425
RETRY_AFTER = {429: "1", 503: "5", TOO_EARLY: "5"}
"""Units: seconds, by status, where the error itself does not know better."""

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499  # nobody reads it; nginx's number, for the log


class _ClientGone(Exception):
    """The client hung up before its answer was ready."""


def create_app(
    engine: EngineProtocol,
    settings: Settings,
    *,
    clock: Callable[[], float] = time.time,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    guard: Guard | None = None,
) -> Flask:
    """The WSGI application that serves `engine`, guarded as the settings say. Raises: SettingsError."""
    app = Flask(__name__, static_folder=None, template_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, MAX_FORM_MEMORY_SIZE=MAX_BODY)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    closing = app.extensions[CLOSING] = threading.Event()
    front = _Front(engine, settings, clock, new_id, closing, guard or Guard(settings))

    app.before_request(front.begin)
    app.after_request(front.end)
    front.guard.install(app)
    for error, handler in (
        (MetaseqApiError, front.refused),
        (HTTPException, front.refused_by_flask),
        (_ClientGone, lambda _: ("", _CLIENT_GONE)),
        (Exception, front.failed),
    ):
        app.register_error_handler(error, handler)

    for path in COMPLETION_PATHS:
        app.add_url_rule(path, f"completions {path}", front.completions, methods=["POST"])
    app.add_url_rule("/generate", "generate", front.generate, methods=["POST"])
    app.add_url_rule("/generation", "generation", front.generation, methods=["POST"])
    app.add_url_rule("/", "page", front.page, methods=["GET"])
    Around(engine, settings, front, clock=clock, new_id=new_id, closing=closing).install(app)
    return app


class _Front:
    """The views and hooks of one app."""

    def __init__(
        self,
        engine: EngineProtocol,
        settings: Settings,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        closing: threading.Event,
        guard: Guard,
    ) -> None:
        self.engine, self.settings, self.clock, self.new_id, self.closing = engine, settings, clock, new_id, closing
        self.guard = guard
        self.html = page.read()
        self.content_policy = page.policy(self.html)

    # views

    def completions(self, engine: str | None = None) -> Response:
        """`engine`, a part of some paths, is not looked at: one service serves one model, as metaseq's does."""
        body = _read_json()
        request = schema.parse_completion(body, self.engine, self.settings, f"cmpl-{self.new_id()}")
        request = self.admit(request, body)
        include_usage = schema.wants_usage(body)
        if request.stream:
            return self.stream(request, include_usage, Stream)
        completions = self.complete(request)
        created = int(self.clock())
        answer = schema.render_completion(
            request,
            completions,
            model=self.engine.model_name,
            created=created,
            metaseq_compat=self.settings.metaseq_compat,
        )
        return _json(answer)

    def generate(self) -> Response:
        if flask.request.mimetype in _FORMS:
            if flask.request.files:
                raise RequestError("a file was sent; send prefix and length as plain fields")
            body = schema.form_to_body(flask.request.form.to_dict(flat=False))
        else:
            body = _read_json(" or a form")
        request = self.admit(schema.parse_generate(body, self.engine, f"gen-{self.new_id()}"), body)
        return _json(schema.render_generate(body["prefix"], self.complete(request)[0]))

    def generation(self) -> Response:
        body = _read_json()
        request = energonai.parse(body, self.engine, self.settings, f"gen-{self.new_id()}")
        return _json(energonai.render(self.complete(self.admit(request, body))))

    def page(self) -> Response:
        headers = {"Content-Security-Policy": self.content_policy, "Cache-Control": "no-cache"}
        return Response(self.html, mimetype="text/html", headers=headers)

    # the engine

    def admit(self, request: Request, body: Mapping[str, Any]) -> Request:
        """The request with its owner, priority and deadline. Raises: RequestError, RateLimited, QuotaExceeded."""
        return self.guard.admit(request, body)

    def complete(self, request: Request) -> list[Completion]:
        """Raises: RequestError, or _ClientGone where the client hung up; the engine then gives the request up."""
        completions = self._await(request)
        self.guard.note(request, completions)
        reasons = ",".join(sorted({c.finish_reason.value for c in completions}))
        g.said = f"{_about(request)} out={sum(c.num_tokens for c in completions)} reason={reasons}"
        return completions

    def _await(self, request: Request) -> list[Completion]:
        gone = _gone()
        answer = self.engine.submit(request)
        flask.request.environ.get(WHEN_GONE, lambda _: None)(answer.cancel)  # at once, not when it is looked for
        try:
            while True:
                try:
                    return answer.result(timeout=terms.patience_s(request, POLL_S, time.monotonic()))
                except TimeoutError:
                    terms.check_deadline(request, time.monotonic())
                    if gone():
                        raise _ClientGone from None
                    if self.closing.is_set():
                        raise stopping() from None
                except RequestError:
                    if gone():
                        raise _ClientGone from None
                    raise
        except BaseException:
            answer.cancel()
            raise

    def stream(self, request: Request, include_usage: bool, kind: type[Stream]) -> Response:
        """The head of an answer whose events follow; its line in the log comes with the last of them."""
        answer = self.engine.submit(request)
        line, settle, whose = self._line(200), self.guard.keep_open(request), self.guard.whose()
        g.said = None

        def end(num_tokens: int, how: str | None) -> None:
            settle(num_tokens, how is not None)
            line(f"{_about(request)} out={num_tokens} streamed reason={how or 'client_gone'}{whose}")

        stream = kind(
            request,
            answer,
            model=self.engine.model_name,
            created=int(self.clock()),
            include_usage=include_usage,
            explain=functools.partial(_explain, g.http_id),
            on_end=end,
        )
        take_over = flask.request.environ.get(TAKE_OVER)
        if take_over is None:  # not our server
            body = stream.events(_gone(), self.closing, POLL_S)
        else:
            take_over(stream)
            body = iter(())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return Response(body, mimetype="text/event-stream", headers=headers, direct_passthrough=True)

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
            self._line(response.status_code)(g.said)
        return response

    def _line(self, status: int) -> Callable[[str], None]:
        """Writes the one line that this request has in the log, when it has ended; by then the request may be gone."""
        method, http_id, began = flask.request.method, g.http_id, g.began
        rule = flask.request.url_rule.rule if flask.request.url_rule else "(no route)"
        level = logging.DEBUG if method == "GET" and status == 200 else logging.INFO

        def write(said: str) -> None:
            log.log(level, "%s %s %s %d %.3f s %s", http_id, method, rule, status, time.monotonic() - began, said)

        return write

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
        answer = _json(_explain(g.http_id, error), ours.status)
        answer.headers["x-should-retry"] = "false"  # to openai's client: the same request would fail again
        return answer


def _gone() -> Callable[[], bool]:
    """Tells whether the client of this request has left. Not where another server than waitress runs: nobody can."""
    gone: Callable[[], bool] = flask.request.environ.get("waitress.client_disconnected", lambda: False)
    return gone


def _about(request: Request) -> str:
    """What the log says of a request; never what it asked."""
    num_in = sum(map(len, request.prompts))
    return f"{request.request_id} prompts={len(request.prompts)} n={request.params.n} in={num_in}"


def _explain(http_id: str, error: Exception) -> dict[str, Any]:
    """An error as a client may see it; of what went wrong here the log has the rest."""
    if isinstance(error, RequestError):
        return schema.render_error(error)
    if isinstance(error, MetaseqApiError):
        log.error("request %s failed: %s", http_id, error)
        ours = error
    else:
        log.error("request %s failed", http_id, exc_info=error)
        ours = MetaseqApiError()
    says = f"something went wrong in the server; its log has the reason under request id {http_id}"
    return schema.render_error(ours, says)


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
