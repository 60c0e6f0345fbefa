"""One question over HTTP, and what its answer means for a file that is fetched in pieces.

Knows ranges, validators, redirects, and which failures are worth another try. Does not know files. Messages name the
host and the path alone: the query of a pre-signed address is a secret. Proxies are urllib's business.
"""

from __future__ import annotations

import email.utils
import http
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from metaseq_api import __version__
from metaseq_api.errors import CheckpointError, CheckpointNotFound, ResourceError

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Broken(Exception):
    """This try failed, and another may not. `wait_s`: the server asked for a pause so long."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Changed(Broken):
    """The file is not the one that an earlier try began to fetch."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes `start` to `end` of a file of `total`; `tag` names its version, None where the server does not."""

    start: int
    end: int
    total: int
    tag: str | None
    body: http.client.HTTPResponse

    def read(self, most: int) -> bytes:
        """What has arrived, at least one byte. Raises: Broken where nothing will, or did not in time."""
        try:
            data = self.body.read1(most)
        except (OSError, http.client.HTTPException) as error:
            raise Broken(_why(error)) from None
        if not data:
            raise Broken("the connection was closed early")
        return data

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.body.close()


def shown(url: str) -> str:
    """Host and path of an address, which may be shown; its user, password and query may not."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path


class Web:
    """Asks. `timeout_s`: a server that sends no byte for so long has broken off. `now`: seconds since 1970."""

    def __init__(self, timeout_s: float = 30.0, now: Callable[[], float] = time.time) -> None:
        self._timeout_s, self._now = timeout_s, now
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirect(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    def length(self, url: str) -> int:
        """How many bytes a file has. One byte is asked for, as some pre-signed addresses refuse HEAD.

        Raises: as `ask` does.
        """
        with self.ask(url, 0, last=0) as answer:
            return answer.total

    def ask(self, url: str, start: int, *, tag: str | None = None, last: int | None = None) -> Answer:
        """Ask for the bytes from `start` on, of the version `tag`; all come where that is gone or ranges are not known.

        Raises: Broken or Changed where another try may do; CheckpointNotFound, CheckpointError, ResourceError if not.
        """
        request = urllib.request.Request(url, headers={"User-Agent": f"metaseq-api/{__version__}"})
        if start or last is not None:
            request.add_header("Range", f"bytes={start}-{'' if last is None else last}")
        if tag is not None:
            request.add_header("If-Range", tag)
        try:
            body = self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(url, start, error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ResourceError(f"{shown(url)}: the certificate is not trusted: {reason.verify_message}") from None
            if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
                raise ResourceError(f"{shown(url)}: there is no such host; check the address, or the network") from None
            raise Broken(_why(reason)) from None
        assert isinstance(body, http.client.HTTPResponse)
        try:
            return _answer(url, start, tag, body)
        except (Broken, CheckpointError):
            body.close()
            raise

    def _refusal(self, url: str, start: int, error: urllib.error.HTTPError) -> Exception:
        code = error.code
        name = next((f"{s.value} {s.phrase}" for s in http.HTTPStatus if s == code), str(code))
        if code in (408, 425, 429) or code >= 500:
            return Broken(f"the server answers {name}", self._retry_after(error.headers.get("Retry-After", "")))
        if code == 416 and start:
            return Changed("the file has become shorter")
        if code in (401, 403):
            remedy = "an address that Meta sends expires after a while: ask for a new one, and put it in quotes"
        elif 300 <= code < 400:
            remedy = (
                "it redirects where one does not follow: only http and https, not from https to http, nor in circles"
            )
            remedy += "; try --url"
        else:
            remedy = "check the address, or name a mirror with --url"
        return CheckpointNotFound(f"{shown(url)}: the server answers {name}; {remedy}")

    def _retry_after(self, text: str) -> float:
        if text.isdecimal():
            return float(text)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - self._now())
        except (ValueError, TypeError, OverflowError):
            return 0.0


class _Redirect(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """Follow; an address that cannot be read is refused like the rest."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:
            raise urllib.error.HTTPError(req.full_url, code, "", headers, fp) from None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Refuse what leaves HTTP, or gives up its encryption."""
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and (scheme != "http" or req.type == "https"):
            raise urllib.error.HTTPError(req.full_url, code, "", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _answer(url: str, start: int, tag: str | None, body: http.client.HTTPResponse) -> Answer:
    """What the headers say. Raises: Changed, Broken, CheckpointError."""
    if (coding := body.headers.get("Content-Encoding", "identity")) != "identity":
        raise CheckpointError(f"{shown(url)} comes in the encoding {coding!r:.40}; wanted the plain file: try --url")
    etag, modified = body.headers.get("ETag"), body.headers.get("Last-Modified")
    # a weak tag, W/"...", promises the same meaning but not the same bytes
    found = etag if etag and etag.startswith('"') else modified
    length = body.headers.get("Content-Length", "")
    if body.status == 206:
        match = _RANGE.fullmatch(body.headers.get("Content-Range", ""))
        if match is None:
            raise Broken("the server says a part comes, but not which")
        first, last, total = map(int, match.groups())
        if first != start or not first <= last < total:
            raise Broken("the server sends another part than was asked for")
        same = etag if tag is not None and tag.startswith('"') else modified  # either may be left out of a 206
        if tag is not None and same is not None and same != tag:
            raise Changed("the file has changed")
        return Answer(first, last + 1, total, found, body)
    if body.status != 200 or not length.isdecimal():
        raise CheckpointError(f"{shown(url)}: the server does not say how long the file is; try a mirror: --url")
    return Answer(0, int(length), int(length), found, body)


def _why(error: object) -> str:
    """A reason in a few words, without what the other side may have put into it."""
    if isinstance(error, TimeoutError):
        return "nothing arrived for too long"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.HTTPException):
        return f"the answer is not proper HTTP: {type(error).__name__}"
    return type(error).__name__
