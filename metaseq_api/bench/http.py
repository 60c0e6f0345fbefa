"""What HTTP costs: the service on the demo model, in processes of its own, beside the same engine alone, in turns.

latency   one token, one connection: what the front end adds to each request
requests  one token, 64 connections: requests a second, beside the engine without HTTP
streams   256 at once: tokens a second, streamed over HTTP, over the engine's without HTTP; and of these decoding alone,
          which is what the last three quarters of the tokens take: letting 256 requests in costs much of a short answer

Knows what is measured and how the sides take turns. Does not know sockets; `clients` does, in a process of its own.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metaseq_api.bench.figures import Row
from metaseq_api.bench.services import Order, clients, cpu_seconds, service
from metaseq_api.bench.subject import Subject, ours
from metaseq_api.core import Request, SamplingParams
from metaseq_api.engine.engine import Engine

PROMPT_LEN = 8
Figures = dict[tuple[str, str], float]
"""What and its unit: how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked. Units: tokens of each stream; requests of each connection."""

    rounds: int = 3
    streams: int = 256
    tokens: int = 200
    connections: int = 64
    requests: int = 40


def measure(of: Subject, load: Load, say: Callable[[str], object]) -> list[Row]:
    """Both sides in turns; every figure a row."""
    alone = Alone(of)
    rows: dict[str, Row] = {}
    with (
        service(of) as running,
        clients(running.host, running.port) as order,
        clients(running.host, running.port, nice=19) as crowd,
    ):
        order(_requests(1, 50))
        _streams_round(alone, crowd, running.pid, load.streams, 8)  # both sides warm
        for turn in range(load.rounds):
            for kind, figures in (
                ("one request at a time", _latency_round(alone, order)),
                (f"{load.connections} connections", _requests_round(alone, order, running.pid, load)),
                (f"{load.streams} streams", _streams_round(alone, crowd, running.pid, load.streams, load.tokens)),
            ):
                for (what, unit), value in figures.items():
                    rows.setdefault(f"{kind}: {what}", Row(what=f"{kind}: {what}", unit=unit)).add("ours", value)
            say(f"round {turn + 1} of {load.rounds} done")
    return list(rows.values())


class Alone:
    """The engine without HTTP, in this process and this thread."""

    def __init__(self, of: Subject) -> None:
        self.engine: Engine = ours(of).engine

    def complete(self, num: int, max_tokens: int) -> float:
        """Seconds that so many requests take, all at once."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        began = time.perf_counter()
        tickets = [
            self.engine.submit(Request(request_id="bench", prompts=(tuple(p),), params=params)) for p in _prompts(num)
        ]
        while not all(t.ended for t in tickets):
            self.engine.turn()
        return time.perf_counter() - began


def _latency_round(alone: Alone, order: Order) -> Figures:
    engine = sorted(alone.complete(1, 1) * 1e3 for _ in range(300))
    http = sorted(s * 1e3 for s in order(_requests(1, 300))["seconds"])
    at = int(0.99 * 300)
    return {
        ("engine alone, p50", "ms"): engine[150],
        ("through HTTP, p50", "ms"): http[150],
        ("added, p50", "ms"): http[150] - engine[150],
        ("engine alone, p99", "ms"): engine[at],
        ("through HTTP, p99", "ms"): http[at],
        ("added, p99", "ms"): http[at] - engine[at],
    }


def _requests_round(alone: Alone, order: Order, pid: int, load: Load) -> Figures:
    engine_s = sum(alone.complete(load.connections, 1) for _ in range(load.requests))
    before = cpu_seconds(pid)
    said = order(_requests(load.connections, load.requests))
    num = len(said["seconds"])
    return {
        ("requests of one token", "a second"): num / said["wall"],
        ("the engine's, without HTTP", "a second"): num / engine_s,
        ("p50", "ms"): statistics.median(said["seconds"]) * 1e3,
        ("the server's CPU for each", "ms"): (cpu_seconds(pid) - before) / num * 1e3,
        ("the clients' CPU for each", "ms"): said["cpu"] / num * 1e3,
    }


def _streams_round(alone: Alone, order: Order, pid: int, num: int, max_tokens: int) -> Figures:
    begin, tokens = max_tokens // 4, num * max_tokens
    cpu = time.process_time()
    engine_s = alone.complete(num, max_tokens)
    engine_cpu, before = time.process_time() - cpu, cpu_seconds(pid)
    said = order(_streams(num, max_tokens))
    server_cpu, http_s = cpu_seconds(pid) - before, max(said["seconds"])
    decode_s = http_s - max(order(_streams(num, begin))["seconds"])
    alone_s = engine_s - alone.complete(num, begin)
    return {
        ("engine alone", "tokens/s"): tokens / engine_s,
        ("through HTTP", "tokens/s"): tokens / http_s,
        ("of the engine's", "share"): engine_s / http_s,
        ("the engine's CPU for a token", "us"): engine_cpu / tokens * 1e6,
        ("engine alone, decoding", "tokens/s"): num * (max_tokens - begin) / alone_s,
        ("through HTTP, decoding", "tokens/s"): num * (max_tokens - begin) / decode_s,
        ("of the engine's, decoding", "share"): alone_s / decode_s,
        ("the server's CPU for a token", "us"): server_cpu / tokens * 1e6,
        ("the clients' CPU for a token", "us"): said["cpu"] / tokens * 1e6,
    }


def _prompts(num: int) -> list[list[int]]:
    r = random.Random(1)
    return [[r.randrange(4, 2000) for _ in range(PROMPT_LEN)] for _ in range(num)]


def _body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def _streams(num: int, max_tokens: int) -> dict[str, Any]:
    return {"what": "streams", "bodies": [{**_body(p, max_tokens), "stream": True} for p in _prompts(num)]}


def _requests(num: int, num_each: int) -> dict[str, Any]:
    return {"what": "requests", "bodies": [_body(p, 1) for p in _prompts(num)], "num_each": num_each}
