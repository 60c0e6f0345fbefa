"""The real service in real processes: started by the door, asked over HTTP, ended and counted."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from support.processes import DEADLINE_S, children, clean_env, command, gone, until

DOOR = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-E", "-m", "metaseq_api.cli.interactive_hosted"]


class Service:
    """metaseq-api-local with these arguments on a free port (or another command line); what it says is in `lines`."""

    def __init__(self, cwd: Path, *arguments: str, door: list[str] = DOOR, wait: bool = True, **env: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*door, *arguments, *([] if "--port" in arguments else ["--port", "0"])],
            cwd=cwd,
            env=clean_env(OMP_NUM_THREADS="1", **env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        if wait:
            until(lambda: self.url or self.process.poll() is not None, "the service to be ready", 90)
            assert self.url, self.lines

    def _listen(self) -> None:
        assert self.process.stderr
        with self.process.stderr as said:
            self.lines.extend(line.rstrip() for line in said)

    def said(self) -> list[str]:
        """All it said, once every process that could say more has ended."""
        self._listener.join(DEADLINE_S)
        assert not self._listener.is_alive(), "somebody still holds its standard error"
        return self.lines

    @property
    def url(self) -> str | None:
        return next((m[1] for line in self.lines if (m := re.search(r"ready on (http://[^/]+)/", line))), None)

    @property
    def ranks(self) -> list[psutil.Process]:
        """The rank processes, in order of rank."""
        return sorted((c for c in self._children if "metaseq_api.host" in command(c)), key=lambda c: command(c)[-1])

    @property
    def front(self) -> psutil.Process:
        """The front end's process."""
        return next(c for c in self._children if command(c)[-1:] == ["metaseq_api.front"])

    @property
    def _children(self) -> list[psutil.Process]:
        return children(self.process.pid)

    def complete(self, timeout: float = 60, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as r:
            answer: dict[str, Any] = json.load(r)
        return answer

    def stream(self, **body: Any) -> str:
        """All events of a streamed answer."""
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as r:
            return str(r.read().decode())

    def status(self, path: str) -> int:
        """What a GET is answered with; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as r:
                return int(r.status)
        except urllib.error.HTTPError as e:
            with e:
                return e.code
        except OSError:
            return 0

    def texts(self, **body: Any) -> list[str]:
        return [c["text"] for c in self.complete(**body)["choices"]]

    def generate_for_ever(self) -> threading.Thread:
        """A client whose request is running for as long as the service lives; returns once it is."""

        def ask() -> None:
            try:
                while True:
                    self.complete(prompt=[[7, 8, 9]] * 16, max_tokens=400, ignore_eos=True)
            except (OSError, urllib.error.HTTPError, json.JSONDecodeError):
                return

        client = threading.Thread(target=ask, daemon=True)
        client.start()

        until(lambda: self.running, "a request to run")
        return client

    @property
    def running(self) -> int:
        """Sequences that run."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as r:
            return int(json.load(r)["num_running"])

    def end(self, seconds: float) -> int:
        """Wait for the end, at most so long, and see that nothing is left."""
        family = [self.process.pid, *(c.pid for c in psutil.Process(self.process.pid).children(recursive=True))]
        code = self.process.wait(seconds)
        until(lambda: all(map(gone, family)), "every process to be gone", 2)
        return code

    def kill(self) -> None:
        """End what is left of it, gently or not."""
        if self.process.poll() is None:
            for p in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # the one before may have taken it along
                    p.kill()
            self.process.kill()
        self.process.wait(10)
        self._listener.join(10)
