"""An answer that is not there yet, and what makes a response of it when it is: no thread waits in between.

A view returns a Later in place of a response. A server that says so (PUT_OFF) keeps it, and asks for the response when
the answer has come; any other has its thread wait. The response is made in the context of its request, with the hooks
and error handlers that every other one has.

Knows Flask's life of a request. Does not know sockets, or what an answer says.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import flask
from flask import Flask, Response

from metaseq_api.core import Answer, Request
from metaseq_api.server import terms

PUT_OFF = "metaseq_api.put_off"
"""Key of a request's environ: have a Later kept by the server, which calls its `response` when it `is_due`."""
POLL_S = 0.2
"""Units: seconds between looks at whether an answer is still waited for."""
ADMIT_S = 5.0
"""Units: seconds after which a stream begins though the engine has not said that it takes the request."""
FEW = 4
"""Completions without scores that are written down at once; more of them, or scores, are large."""


class App(Flask):
    """Flask with views that may return a Later; the hooks after a request are for the response it becomes."""

    def finalize_request(self, rv: Any, from_error_handler: bool = False) -> Any:
        return rv if isinstance(rv, Later) else super().finalize_request(rv, from_error_handler)

    def respond(self, view: Callable[[], Response]) -> Response:
        """What becomes of what this view returns or raises, in the context of a request that was begun before."""
        try:
            try:
                found: Any = view()
            except Exception as e:
                found = self.handle_user_exception(e)
            response: Response = super().finalize_request(found)
        except Exception as e:  # in a hook
            response = self.handle_exception(e)
        return response


class Later:
    """finish: makes the response, or raises as a view does; it finds the answer ended, or has to say why nobody waits
    for it any longer: `is_gone` (its client went away), `closing`, or its deadline."""

    def __init__(
        self,
        request: Request,
        answer: Answer,
        finish: Callable[[], Response],
        is_gone: Callable[[], bool],
        closing: threading.Event,
    ) -> None:
        self.watch = answer.watch
        self._request, self._answer, self._finish = request, answer, finish
        self._is_gone, self._closing = is_gone, closing
        self._admit_by = time.monotonic() + ADMIT_S
        self._app: App = flask.current_app._get_current_object()  # type: ignore[attr-defined]
        self._context = contextvars.copy_context()

    @property
    def is_small(self) -> bool:
        """Whether its response is made in no time."""
        p = self._request.params
        few = p.logprobs is None and p.prompt_logprobs is None and len(self._request.prompts) * p.n <= FEW
        return few or self._request.stream

    def is_due(self) -> bool:
        """Whether the answer has come, or is waited for no longer: then `response` is to be called, once."""
        if self._answer.ended or self._is_gone() or self._closing.is_set():
            return True
        if self._request.stream:  # what more there is to wait for is for the stream
            return self._answer.admitted or time.monotonic() >= self._admit_by
        return terms.is_overdue(self._request, time.monotonic())

    def response(self) -> Response:
        """The response, or that of an error."""
        return self._context.run(self._app.respond, self._finish)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """As WSGI has it."""
        if PUT_OFF in environ:
            environ[PUT_OFF](self)
            return ()
        woken = threading.Event()
        self.watch(woken.set)
        while not self.is_due():
            woken.wait(terms.patience_s(self._request, POLL_S, time.monotonic()))
        return self.response()(environ, start_response)
