"""metaseq-api-slurm proxy as a process of its own, and HAProxy below it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import psutil
import pytest
from support.processes import until


def need_haproxy(*, install: bool = False) -> None:
    """Skip where there is no HAProxy and, with `install`, none can be had."""
    if any(shutil.which(place) for place in ("haproxy", "/usr/sbin/haproxy")):
        return
    if not install:
        pytest.skip("HAProxy is not installed; `make haproxy` does that")
    argv = ["bash", str(Path(__file__).with_name("slurm_cluster.sh")), "install-haproxy"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        pytest.skip(f"no HAProxy here: {done.stderr.strip()}")


class Proxy:
    """The command, running; `url` once it is up."""

    def __init__(self, name: str, *flags: str, wait: bool = True) -> None:
        argv = [sys.executable, "-m", "metaseq_api.slurm.manage", "proxy", name, *flags]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.url = ""
        self._listeners = [
            threading.Thread(target=self._listen, args=(stream,))
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for listener in self._listeners:
            listener.start()
        try:
            until(lambda: self.url or self.process.poll() is not None, "the proxy to be up")
            assert self.url or not wait, self.lines
        except BaseException:
            self.end()
            raise

    def _listen(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.append(line.rstrip())
                if " is at http://" in line:
                    self.url = line.split()[-1]

    @property
    def haproxy(self) -> int:
        """HAProxy's process id."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def end(self) -> int:
        """End it at once, if it has not ended; its exit code."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait(10)
        for listener in self._listeners:
            listener.join(10)
        return code
