"""Who may ask, how much, and for how long: what stands before and after every route.

Knows where a key is looked for and which routes need none. Does not know how keys are kept (`keys`), limits counted
(`quota`), deadlines read (`terms`), or what the routes do.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import flask
from flask import Flask, Response, g

from metaseq_api.core import Completion, Request
from metaseq_api.errors import NotAuthorized
from metaseq_api.server import quota, terms
from metaseq_api.server.cors import Cors
from metaseq_api.server.key_file import Key
from metaseq_api.server.keys import Keyring, open_keyring
from metaseq_api.server.quota import Charge, Quotas
from metaseq_api.settings import Settings

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""The page asks for the key itself; what looks whether a service lives has none."""
METRICS = "/metrics"
"""Open too unless GUARD_METRICS says otherwise: numbers, no text, and scrapers mostly send no key."""
KEY_HEADERS = ("X-API-Key", "api-key")
ANYONE = Key(name="", salt=b"", hash=b"")
"""Whose requests are where no key is asked for."""
_CUT_SHORT = (499, 504)
"""The client left, or the time was over: how far it got is not known, and the charge stays."""
_BEARER = re.compile(r"(?i:bearer) +(.+)")


class Guard:
    """Of one app. Raises: SettingsError where its keys cannot be read."""

    def __init__(
        self,
        settings: Settings,
        *,
        keyring: Keyring | None = None,
        quotas: Quotas | None = None,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keyring = keyring or open_keyring(settings)
        self._quotas = quotas or Quotas()
        self._cors = Cors(settings.cors_origins)
        self._most_s, self._tick = settings.request_timeout_s, tick
        self._open = OPEN_PATHS if settings.guard_metrics else OPEN_PATHS | {METRICS}

    def install(self, app: Flask) -> None:
        """Stand before and after every route of `app`, inside the hooks it has already."""
        app.before_request(self.check)
        app.after_request(self.finish)

    def check(self) -> Response | None:
        """Before a route. Raises: NotAuthorized, Forbidden, RateLimited."""
        g.key, g.charge = ANYONE, None
        if flask.request.method == "OPTIONS":  # what may be asked is no secret, and a browser asks without a key
            return self._cors.preflight()
        if self._keyring is None:
            self._cors.refuse_foreign()
        elif (flask.request.path.rstrip("/") or "/") not in self._open:
            g.key = self._find(self._keyring)
            if flask.request.method == "POST":
                self._quotas.count_request(g.key)
        return None

    def admit(self, request: Request, body: Mapping[str, Any]) -> Request:
        """The request with its owner and deadline, charged to its key's limits; `finish` gives back what was not used.

        Raises: RequestError, RateLimited, QuotaExceeded.
        """
        timeout_s = terms.read_timeout_s(body, self._most_s)
        key: Key = g.key
        request = dataclasses.replace(
            request,
            tenant=key.name,
            weight=key.weight,
            priority=terms.read_priority(body),
            deadline_s=None if timeout_s is None else self._tick() + timeout_s,
        )
        g.charge = self._quotas.admit(key, quota.cost(request))
        return request

    def note(self, request: Request, completions: list[Completion]) -> None:
        """Note what an answer came to."""
        g.charge.num_used = quota.used(request, completions)

    def keep_open(self, request: Request) -> Callable[[int, bool], None]:
        """Keep the charge of an answer that is streamed after this request has left its route.

        Gives what ends it: told how many tokens were generated, and whether these were all.
        """
        charge: Charge = g.charge
        g.charge = None

        def end(num_generated: int, is_whole: bool) -> None:
            charge.num_used = sum(map(len, request.prompts)) + num_generated if is_whole else None
            charge.settle()

        return end

    def finish(self, response: Response) -> Response:
        """After a route, or an error instead of one."""
        key: Key = g.key
        charge: Charge | None = g.charge
        if g.said is not None:
            g.said += self.whose()
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="metaseq-api"'
        if charge is not None:
            if response.status_code >= 400 and response.status_code not in _CUT_SHORT:
                charge.num_used = 0
            charge.settle()
        if key.name and flask.request.method == "POST":
            response.headers.update(self._quotas.headers(key))
        self._cors.add_headers(response)
        return response

    def whose(self) -> str:
        """What the log says of this request's key: its name."""
        return f" key={g.key.name}" if g.key.name else ""

    def _find(self, keyring: Keyring) -> Key:
        given = _given()
        if not given:
            raise NotAuthorized("no API key was sent; send one as the header Authorization: Bearer KEY")
        key = keyring.find(given)
        if key is None:
            raise NotAuthorized("this API key is not known here; check it, or ask whoever runs this service for one")
        if keyring.has_expired(key):
            raise NotAuthorized("this API key has expired; ask whoever runs this service for a new one")
        return key


def _given() -> str:
    """The key a client sent, from the first header that holds one."""
    headers = flask.request.headers
    if found := _BEARER.fullmatch(headers.get("Authorization", "").strip()):
        return found[1].strip()
    return next((headers[name].strip() for name in KEY_HEADERS if headers.get(name)), "")
