"""Which pages may call this service from a browser.

Knows origins and the headers that browsers send and heed. Does not know keys. A browser lets a page read only answers
of its own origin, unless the answer allows more; some requests it sends all the same, a form say, and where no key is
asked for these would compute: `refuse_foreign` is for them.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import flask
from flask import Response

from metaseq_api.errors import Forbidden

MAX_AGE_S = 600
"""Units: seconds that a browser remembers a permission."""
EXPOSED = ", ".join(
    ["Retry-After", "X-Request-Id", "x-should-retry"]
    + [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
)
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(\s*,\s*[A-Za-z0-9-]{1,64}){0,63}")


class Cors:
    """Off unless origins are named. Keys come in a header and never in a cookie, so credentials are not allowed."""

    def __init__(self, origins: str | None) -> None:
        self._origins = frozenset(o.strip() for o in (origins or "").split(",") if o.strip())

    def preflight(self) -> Response | None:
        """The answer to a browser that asks first, or None where this is another request."""
        headers = flask.request.headers
        if flask.request.method != "OPTIONS" or "Access-Control-Request-Method" not in headers or not self._allows():
            return None
        answer = Response(status=204)
        answer.headers["Access-Control-Allow-Methods"] = "GET, POST"
        answer.headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
        wanted = headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(wanted):  # any: clients send many of their own, and "*" leaves Authorization out
            answer.headers["Access-Control-Allow-Headers"] = wanted
        return answer

    def add_headers(self, response: Response) -> None:
        """Let the pages that may read an answer read it."""
        if not self._origins:
            return
        response.vary.add("Origin")
        if self._allows():
            origin = "*" if "*" in self._origins else flask.request.headers["Origin"]
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED

    def refuse_foreign(self) -> None:
        """Raises: Forbidden where a page of another origin, that is not allowed to, has a browser send this."""
        headers = flask.request.headers
        if flask.request.method in ("GET", "HEAD", "OPTIONS") or self._allows():
            return
        site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
        if site is None and origin is not None:  # plain HTTP by name, or an old browser
            site = "same-origin" if urlsplit(origin).netloc == headers.get("Host") else "cross-site"
        if site in ("cross-site", "same-site"):
            raise Forbidden(
                f"a page of another origin sent this; let pages call this service with --cors-origins "
                f"{(origin or 'ORIGIN')[:100]}, or use the page at /"
            )

    def _allows(self) -> bool:
        origin = flask.request.headers.get("Origin")
        return origin is not None and ("*" in self._origins or origin in self._origins)
