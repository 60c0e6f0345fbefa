"""From the command to the first token of a service, several times in a row, and where that went.

The first start finds nothing compiled, as on a machine that is new to it; those after it find what it left. The service
tells its laps itself (`launch.startup`); the client adds how long it then waited for a token. Does not know what is
done in a lap, and does not empty the page cache: the first start finds the files as the machine left them.
"""

from __future__ import annotations

import http.client
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.bench.figures import shown
from metaseq_api.bench.services import Service, service
from metaseq_api.bench.subject import Subject
from metaseq_api.errors import ServiceError

TOLD = re.compile(r"ready after ([\d.]+) s: (.*)")
ASK = {"prompt": [2, 5, 6, 7], "max_tokens": 1, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start. Units: seconds; ready by the service's own clock, first_token by the client's."""

    ready: float
    first_token: float
    laps: dict[str, float]


def measure(of: Subject, starts: int, say: Callable[[str], object]) -> list[Start]:
    """Start it, ask for one token, end it; as often as told. Raises: ServiceError."""
    found = []
    with tempfile.TemporaryDirectory(prefix="metaseq-api-startup-") as kept:
        for number in range(starts):
            began = time.perf_counter()
            with service(of, kept=Path(kept)) as running:
                _ask(running)
                waited = time.perf_counter() - began
            found.append(read(running.said, waited))
            say(f"start {number + 1} of {starts}: {waited:.1f} s")
    return found


def read(said: Sequence[str], waited: float) -> Start:
    """What a service said of its start. Raises: ServiceError where it said nothing."""
    for line in said:
        if told := TOLD.search(line):
            laps = (lap.rpartition(" ") for lap in told[2].split(", ") if lap)
            return Start(ready=float(told[1]), first_token=waited, laps={name: float(s) for name, _, s in laps})
    raise ServiceError("this service does not tell how long it took to be ready")


def _ask(running: Service) -> None:
    connection = http.client.HTTPConnection(running.host, running.port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(ASK), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    if answer.status != 200:
        raise ServiceError(f"the first token was refused: {said.decode(errors='replace')[:200]}")


def cells(starts: Sequence[Start]) -> list[list[str]]:
    """A head, and a line for each lap; a column for each start."""
    laps = list(dict.fromkeys(name for start in starts for name in start.laps))
    lines = [["seconds", *(f"start {i + 1}" for i in range(len(starts)))]]
    lines.append(["from the command to the first token", *(shown(s.first_token) for s in starts)])
    lines.append(["from the command until ready", *(shown(s.ready) for s in starts)])
    for name in laps:  # told in tenths
        lines.append([f"- {name}", *(f"{s.laps[name]:.1f}" if name in s.laps else "" for s in starts)])
    return lines
