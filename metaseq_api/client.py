"""A client of a running server: one question, one answer, or its pieces as they come. The standard library alone.

Knows HTTP and server-sent events from the asking side, and turns what a server refuses back into the errors of
`errors`. Does not know the fields of a question; the server does.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from metaseq_api import errors
from metaseq_api.errors import MetaseqApiError, RequestError, SettingsError

PATH = "/v1/completions"
TRIES = 6
"""How often a question is asked that a busy server refuses with 429."""
LONGEST_WAIT_S = 30.0
_REFUSALS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RequestError)]
_BY_CODE = {c.code: c for c in reversed(_REFUSALS)}  # the more general ones stand first, and count
_BY_STATUS = {c.status: c for c in reversed(_REFUSALS)}
"""Where another server, a proxy say, answers with a code of its own."""


class Client:
    """Asks the server at `url`, from any number of threads; each question has a connection of its own.

    Units: timeout_s seconds without a byte; a long answer that is not streamed comes all at once. `key` goes along as a
    bearer token. Raises: SettingsError where `url` is none.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 600.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise SettingsError(f"--url {url} is no address of a server; it should look like http://127.0.0.1:6010")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._new = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._timeout_s = parts.hostname, port, timeout_s
        self._path = parts.path.rstrip("/").removesuffix("/v1") + PATH
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._sleep = sleep
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False
        self._lock = threading.Lock()

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer. Raises: RequestError as the server has it; MetaseqApiError where it cannot be reached."""
        with self._ask(body) as response:
            answer = _object(response.read())
        if answer is None:
            raise self._strange(response)
        return answer

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer's chunks. To stop reading is to give the answer up. Raises: as `complete`."""
        with self._ask({**body, "stream": True}) as response:
            if response.headers.get_content_type() != "text/event-stream":
                raise self._strange(response)
            for line in response:
                name, _, data = line.decode("utf-8", "replace").strip().partition(":")
                if name != "data":
                    continue
                if data.strip() == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise _error(0, chunk)
                yield chunk
        raise MetaseqApiError(f"{self.url} broke its answer off; ask again")

    def close(self) -> None:
        """Break off every question that is open, in whatever thread it is asked."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                sock = connection.sock
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _ask(self, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = self._new(self._host, self._port, timeout=self._timeout_s)
        with self._lock:
            self._open.add(connection)
        try:
            for left in reversed(range(TRIES)):
                connection.request("POST", self._path, json.dumps(body).encode(), self._headers)
                response = connection.getresponse()
                if response.status == 200:
                    break
                raw = response.read()
                error = _error(response.status, _object(raw)) if _object(raw) else self._strange(response)
                busy = response.status == 429 and isinstance(error, RequestError) and error.worth_retrying
                if not busy or not left or self._closed:
                    raise error
                self._sleep(_seconds(response.headers.get("Retry-After")))
            yield response
        except (OSError, http.client.HTTPException, ValueError) as e:
            says = (e.strerror if isinstance(e, OSError) else "") or str(e) or type(e).__name__
            raise MetaseqApiError(f"no answer from {self.url}: {says}; is the server running there?") from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _strange(self, response: http.client.HTTPResponse) -> MetaseqApiError:
        return MetaseqApiError(
            f"{self.url} answered {response.status} {response.reason}, and not as this API does; "
            "see that --url names a metaseq-api server"
        )


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _error(status: int, body: dict[str, Any] | None) -> MetaseqApiError:
    """What the server said, as the error it was there."""
    told = (body or {}).get("error")
    told = told if isinstance(told, dict) else {}
    says = str(told.get("message") or f"the server answered {status}")
    if (status >= 500 and status not in _BY_STATUS) or (not status and told.get("type") == "server_error"):
        return MetaseqApiError(says)
    kind = _BY_CODE.get(str(told.get("code")), _BY_STATUS.get(status, RequestError))
    return kind(says, param=told.get("param"), code=told.get("code"))


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after or 1), 0.1), LONGEST_WAIT_S)
    except ValueError:
        return 1.0
