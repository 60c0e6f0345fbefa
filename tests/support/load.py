"""Clients that ask one address without a pause, each on a connection of its own, and what came of each request."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from collections import Counter
from typing import Any


class Asker:
    """One address and its key."""

    def __init__(self, url: str, key: str) -> None:
        self._at = urllib.parse.urlsplit(url)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def complete(self, **body: Any) -> str:
        """One request: "answered", or the status and code of the error, or how the connection broke."""
        assert self._at.hostname
        connection = http.client.HTTPConnection(self._at.hostname, self._at.port, timeout=90)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                return f"{answer.status} {json.loads(text)['error']['code']}"
            if body.get("stream"):
                if '"error"' in text:
                    return "told in the stream"
                return "answered" if text.endswith("data: [DONE]\n\n") else "cut short"
            return "answered" if json.loads(text)["choices"] else "empty"
        except ConnectionRefusedError:
            return "refused"
        except http.client.IncompleteRead:
            return "broken stream"
        except (OSError, http.client.HTTPException) as e:
            return repr(e)
        finally:
            connection.close()


class Load:
    """So many clients, until told to end; `found` says by client what its requests came to."""

    def __init__(self, asker: Asker, num: int, **body: Any) -> None:
        self.found: list[Counter[str]] = [Counter() for _ in range(num)]
        self.over = threading.Event()
        self._asker, self._body = asker, body
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(num)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self.over.is_set():
            what = self._asker.complete(**self._body)
            self.found[number][what] += 1
            if what != "answered":
                self.over.wait(0.05)

    @property
    def all(self) -> Counter[str]:
        return sum(self.found, Counter())

    def end(self) -> Counter[str]:
        """Ask no more, and wait for what was asked; all that was found."""
        self.over.set()
        for thread in self._threads:
            thread.join(100)
            assert not thread.is_alive()
        return self.all
