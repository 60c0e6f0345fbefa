"""Services to be measured, in processes of their own, and processes of clients that ask them.

A checkpoint is served by the door that everybody uses; random weights, which no door serves, by the same supervisor
over `shape_host`. Knows processes, and the line by which a service says that it is ready; not what is measured.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaseq_api.bench.children import SAFE, child_of
from metaseq_api.bench.subject import Subject
from metaseq_api.errors import ServiceError
from metaseq_api.launch.order import settings_to_dict

Order = Callable[[Mapping[str, Any]], dict[str, Any]]
READY = re.compile(r"ready on http://(\[[^\]]+\]|[^:]+):(\d+)/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One that is ready. said: its log until then."""

    pid: int
    host: str
    port: int
    said: tuple[str, ...]


def command(of: Subject) -> list[str]:
    """What starts it on a free port."""
    settings = of.settings
    if of.shape is not None:
        fields = json.dumps(settings_to_dict(settings))
        return [sys.executable, *SAFE, "-m", "metaseq_api.bench.shape_host", fields]
    flags: dict[str, object] = {
        "--port": 0,
        "--dtype": settings.dtype,
        "--device": settings.device,
        "--threads": settings.threads,
        "--model-parallel": settings.model_parallel,
    }
    told = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    named = [] if settings.demo else [str(settings.checkpoint)]
    return [sys.executable, *SAFE, "-m", "metaseq_api.cli.interactive_hosted", *named, *told]


@contextmanager
def service(of: Subject, *, kept: Path | None = None) -> Iterator[Service]:
    """A service that is ready. Raises: ServiceError with what it said where it ended before.

    kept: a folder for what it compiles; None: the user's.
    """
    told = [] if kept is None else ["env", f"XDG_CACHE_HOME={kept}", f"TRITON_CACHE_DIR={kept / 'triton'}"]
    with subprocess.Popen(
        [*told, *command(of)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        # reads on once it is ready, so that its log finds room
        reader = threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True)
        try:
            assert process.stderr
            lines: list[str] = []
            for line in process.stderr:
                lines.append(line.rstrip())
                if found := READY.search(line):
                    break
            else:
                raise ServiceError("the service that is to be measured did not start: " + " | ".join(lines[-3:]))
            reader.start()
            yield Service(pid=process.pid, host=found[1].strip("[]"), port=int(found[2]), said=tuple(lines))
        finally:
            process.terminate()
            if reader.is_alive():
                reader.join()


@contextmanager
def clients(host: str, port: int, *, nice: int = 0) -> Iterator[Order]:
    """A process of clients that does what it is ordered and says how long that took.

    nice: with 19 it takes what the service leaves, as clients on other machines do; and finds several tokens at once,
    so that it can tell how long all took, but not when each came.
    """
    code = f"from metaseq_api.bench.clients import child; child({host!r}, {port})"
    with child_of(code) as process:
        os.setpriority(os.PRIO_PROCESS, process.pid, nice)
        assert process.stdin
        assert process.stdout
        to, back = process.stdin, process.stdout

        def order(what: Mapping[str, Any]) -> dict[str, Any]:
            to.write(json.dumps(what) + "\n")
            to.flush()
            line = back.readline()
            if not line:
                raise ServiceError(f"the clients of {host}:{port} ended; their own words are above")
            said: dict[str, Any] = json.loads(line)
            return said

        yield order


def cpu_seconds(pid: int) -> float:
    """What a process and all below it have used. Source: /proc/PID/stat, fields 14 and 15, in ticks."""
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = int(used[11]) + int(used[12])
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in below)
