"""A service as its clients see it, through HTTP: so many streams at once, or requests that come at random at some rate.

Of each stream: the time to its first token (TTFT), the mean time of the tokens after it (TPOT), the gaps between events
(ITL; an event may hold more than one token), and the whole (E2E). Goodput is the rate of requests that kept both
limits. Requests that come by themselves are a Poisson process of one seed, and wait from the moment they were due.

Knows what is asked and what is made of the answers. Does not know sockets (`watching`) or processes (`services`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaseq_api.bench.figures import percentile, shown
from metaseq_api.bench.services import Order
from metaseq_api.bench.work import LONGEST, SHORTEST, mixed
from metaseq_api.errors import ServiceError

SHARES = (0.5, 0.9, 0.99)
TIMES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked. Units: tokens; requests of one level; ttft and tpot limits in milliseconds."""

    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    """Units: requests a second."""
    requests: int | None = None
    """None: four for each stream at once, or what comes in half a minute, at least 16."""
    new_tokens: int = 128
    shortest: int = SHORTEST
    longest: int = LONGEST
    seed: int = 0
    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    model: str | None = None
    headers: tuple[str, ...] = ("Connection: close",)
    path: str = "/v1/completions"

    def bodies(self, num: int, seed: str) -> list[dict[str, Any]]:
        fixed: dict[str, Any] = {"max_tokens": self.new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        fixed |= {"stream_options": {"include_usage": True}, **({"model": self.model} if self.model else {})}
        return [{"prompt": p, **fixed} for p in mixed(num, seed, self.shortest, self.longest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One step of a sweep. Units: times in milliseconds, rates a second; good: the share that kept both limits."""

    what: str
    num_requests: int
    num_failed: int
    why_failed: str
    request_rate: float
    output_rate: float
    good: float
    goodput: float
    tokens_per_event: float
    client_cpu: float
    """Share of a core that the clients took."""
    times: dict[str, list[float]] = field(default_factory=dict)
    """p50, p90 and p99 of each of TIMES."""


def arrivals(rate: float, num: int, seed: int) -> list[float]:
    """When so many requests come, at random and at this rate. Units: seconds from the first, which comes at once."""
    r, at = random.Random(f"{seed}-{rate}"), [0.0]
    while len(at) < num:
        at.append(at[-1] + r.expovariate(rate))
    return at


def measure(order: Order, load: Load, say: Callable[[str], object], probe: Callable[[], object]) -> list[Level]:
    """Every level, one after the other, once warm; the machine is probed after each, when the service is idle.

    Raises: ServiceError where nothing was answered.
    """
    _ask(order, load, load.bodies(2, "warm"), None, 2)
    levels = []
    for num in load.concurrency:
        bodies = load.bodies(load.requests or max(16, 4 * num), f"{load.seed}-{num}-at-once")
        levels.append(summary(f"{num} at once", _ask(order, load, bodies, None, num), load))
        probe()
        say(f"{num} at once: done")
    for rate in load.rates:
        num = load.requests or max(16, round(30 * rate))
        bodies = load.bodies(num, f"{load.seed}-{rate}-a-second")
        said = _ask(order, load, bodies, arrivals(rate, num, load.seed), num)
        levels.append(summary(f"{rate:g} a second", said, load))
        probe()
        say(f"{rate:g} requests a second: done")
    return levels


def _ask(
    order: Order, load: Load, bodies: list[dict[str, Any]], at: list[float] | None, concurrency: int
) -> dict[str, Any]:
    said = order(
        {
            "what": "watched",
            "bodies": bodies,
            "path": load.path,
            "headers": list(load.headers),
            "at": at,
            "concurrency": concurrency,
        }
    )
    if all(answer["error"] for answer in said["answers"]):
        raise ServiceError(f"no request was answered: {said['answers'][0]['error']}")
    return said


def summary(what: str, said: Mapping[str, Any], load: Load) -> Level:
    """What one level's answers come to; failed ones are counted and nothing else."""
    answers = [a for a in said["answers"] if not a["error"]]
    failed = [a["error"] for a in said["answers"] if a["error"]]
    each = [_times(a) for a in answers]
    wall = max(a["events"][-1] for a in answers) - min(a["due"] for a in said["answers"])
    good = [t for t in each if t["ttft"] <= load.ttft_ms and t.get("tpot", 0.0) <= load.tpot_ms]
    gaps = [1e3 * (b - a) for of in answers for a, b in zip(of["events"], of["events"][1:], strict=False)]
    numbers = {name: gaps if name == "itl" else [t[name] for t in each if name in t] for name in TIMES}
    num_tokens = sum(a["num_tokens"] for a in answers)
    return Level(
        what=what,
        num_requests=len(said["answers"]),
        num_failed=len(failed),
        why_failed=failed[0] if failed else "",
        request_rate=len(answers) / wall,
        output_rate=num_tokens / wall,
        good=len(good) / len(said["answers"]),
        goodput=len(good) / wall,
        tokens_per_event=num_tokens / sum(len(a["events"]) for a in answers),
        client_cpu=said["cpu"] / wall,
        times={name: [percentile(numbers[name], share) for share in SHARES] for name in TIMES},
    )


def _times(answer: Mapping[str, Any]) -> dict[str, float]:
    """Units: milliseconds. A single token has no time after it."""
    due, first, last = answer["due"], answer["events"][0], answer["events"][-1]
    out = {"ttft": 1e3 * (first - due), "e2e": 1e3 * (last - due)}
    if answer["num_tokens"] > 1:
        out["tpot"] = 1e3 * (last - first) / (answer["num_tokens"] - 1)
    return out


def cells(levels: Sequence[Level], load: Load) -> list[list[str]]:
    """A head, and a line for each level."""
    head = ["p50/p90/p99 in ms", "requests/s", "output tokens/s", *(name.upper() for name in TIMES)]
    head += [f"goodput, requests/s (TTFT <= {load.ttft_ms:g}, TPOT <= {load.tpot_ms:g} ms)", "tokens an event"]
    lines = [head]
    for level in levels:
        failed = f", {level.num_failed} of {level.num_requests} failed" if level.num_failed else ""
        rates = [shown(level.request_rate), shown(level.output_rate)]
        times = ["/".join(map(shown, level.times[name])) for name in TIMES]
        good = f"{shown(level.goodput)} ({100 * level.good:.0f} %)"
        lines.append([level.what + failed, *rates, *times, good, f"{level.tokens_per_event:.2f}"])
    return lines


def points(levels: Sequence[Level]) -> list[tuple[float, float]]:
    """Median seconds a token and output tokens a second: what is plotted."""
    return [(level.times["tpot"][0] / 1e3, level.output_rate) for level in levels]
