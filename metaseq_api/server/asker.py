"""Asking the engine, for every route that does: an answer that comes later, or a stream; and what the log says of it.

Knows who waits for an answer, and until when. Does not know any route, or the fields of a body.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import flask
from flask import Response, g

from metaseq_api.core import Answer, Completion, EngineProtocol, Request
from metaseq_api.errors import MetaseqApiError, RequestError
from metaseq_api.server import schema, terms
from metaseq_api.server.guard import Guard
from metaseq_api.server.later import POLL_S, Later
from metaseq_api.server.stream import Stream, stopping
from metaseq_api.server.wire import to_json

log = logging.getLogger(__name__)

TAKE_OVER = "metaseq_api.take_over"
"""Key of a request's environ: leave a Stream to the server, which sends it after the head of the (empty) answer."""


class ClientGone(Exception):
    """The client hung up before its answer was ready."""


class Asker:
    """Of one app. `closing`: once it is set, waiting requests are given up and answered 503."""

    def __init__(
        self, engine: EngineProtocol, guard: Guard, *, clock: Callable[[], float], closing: threading.Event
    ) -> None:
        self._engine, self._guard, self._clock, self._closing = engine, guard, clock, closing

    def admit(self, request: Request, body: Mapping[str, Any]) -> Request:
        """The request with its owner, priority and deadline. Raises: RequestError, RateLimited, QuotaExceeded."""
        return self._guard.admit(request, body)

    def complete(self, request: Request, render: Callable[[list[Completion]], dict[str, Any]]) -> Later:
        """The answer to a request, when it has come, rendered. Raises: RequestError."""
        answer, gone = self._engine.submit(request), _gone()

        def finish() -> Response:
            completions = self._result(request, answer, gone)
            self._guard.note(request, completions)
            reasons = ",".join(sorted({c.finish_reason.value for c in completions}))
            g.said = f"{_about(request)} out={sum(c.num_tokens for c in completions)} reason={reasons}"
            return to_json(render(completions))

        return Later(request, answer, finish, gone, self._closing)

    def _result(self, request: Request, answer: Answer, gone: Callable[[], bool]) -> list[Completion]:
        """Of an answer that has come, or that nobody waits for any longer; the engine then gives the request up.

        Raises: RequestError, EngineStopped, ClientGone.
        """
        if gone():
            answer.cancel()
            raise ClientGone
        try:
            return answer.result(0)
        except TimeoutError:
            answer.cancel()
            terms.check_deadline(request, time.monotonic())
            raise stopping() from None

    def stream(self, request: Request, include_usage: bool, kind: type[Stream]) -> Later:
        """The head of an answer whose events follow, when the engine has taken the request: until then it may yet be an
        error's. Raises: RequestError.
        """
        answer, gone = self._engine.submit(request), _gone()

        def begin() -> Response:
            if gone() or self._closing.is_set():
                answer.cancel()
                raise ClientGone if gone() else stopping()
            if answer.ended and not answer.admitted:
                answer.take()  # which raises what it was refused for
            return self._begin(request, answer, include_usage, kind)

        return Later(request, answer, begin, gone, self._closing)

    def _begin(self, request: Request, answer: Answer, include_usage: bool, kind: type[Stream]) -> Response:
        """Its line in the log comes with the last of its events."""
        line, settle, whose = line_of(200), self._guard.keep_open(request), self._guard.whose()
        g.said = None

        def end(num_tokens: int, how: str | None) -> None:
            settle(num_tokens, how is not None)
            line(f"{_about(request)} out={num_tokens} streamed reason={how or 'client_gone'}{whose}")

        stream = kind(
            request,
            answer,
            model=self._engine.model_name,
            created=int(self._clock()),
            include_usage=include_usage,
            explain=functools.partial(explain, g.http_id),
            on_end=end,
        )
        take_over = flask.request.environ.get(TAKE_OVER)
        if take_over is None:  # not our server
            body = stream.events(_gone(), self._closing, POLL_S)
        else:
            take_over(stream)
            body = iter(())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return Response(body, mimetype="text/event-stream", headers=headers, direct_passthrough=True)


def line_of(status: int) -> Callable[[str], None]:
    """Writes the one line that this request has in the log, when it has ended; by then the request may be gone."""
    method, http_id, began = flask.request.method, g.http_id, g.began
    rule = flask.request.url_rule.rule if flask.request.url_rule else "(no route)"
    level = logging.DEBUG if method == "GET" and status == 200 else logging.INFO

    def write(said: str) -> None:
        log.log(level, "%s %s %s %d %.3f s %s", http_id, method, rule, status, time.monotonic() - began, said)

    return write


def explain(http_id: str, error: Exception) -> dict[str, Any]:
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


def _gone() -> Callable[[], bool]:
    """Tells whether the client of this request has left. Not where another server than waitress runs: nobody can."""
    gone: Callable[[], bool] = flask.request.environ.get("waitress.client_disconnected", lambda: False)
    return gone


def _about(request: Request) -> str:
    """What the log says of a request; never what it asked."""
    num_in = sum(map(len, request.prompts))
    return f"{request.request_id} prompts={len(request.prompts)} n={request.params.n} in={num_in}"
