"""What HTTP costs: the service on the demo model, in processes of its own, beside the same engine alone, in turns.

    python -m metaseq_api.bench.http --rounds 3

latency   one token, one connection: what the front end adds to each request
requests  one token, 64 connections: requests a second
streams   256 at once: tokens a second, streamed over HTTP, over the engine's without HTTP

Knows what is measured and how the sides take turns. Does not know sockets; `load` does, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from metaseq_api import host
from metaseq_api.core import Request, SamplingParams
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.settings import Settings

PROMPT_LEN = 8
Tell = Callable[[str], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine, on both sides")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--requests", type=int, default=40, help="of each connection")
    parser.add_argument("--json", help="write all figures here")


def run(args: argparse.Namespace, tell: Tell) -> int:
    """Measure, and tell a line for each figure."""
    alone = Alone(args.threads)
    figures: dict[str, list[dict[str, float]]] = {"latency": [], "requests": [], "streams": []}
    with service(args.threads) as (pid, port), load(port) as order:
        order(_requests(1, 50))
        _streams_round(alone, order, pid, args.streams, 8)  # both sides warm
        for turn in range(args.rounds):
            figures["latency"].append(_latency_round(alone, order))
            figures["requests"].append(_requests_round(order, pid, args.connections, args.requests))
            figures["streams"].append(_streams_round(alone, order, pid, args.streams, args.tokens))
            tell(f"round {turn + 1} of {args.rounds}: " + json.dumps({f: v[-1] for f, v in figures.items()}))
    for name, rounds in figures.items():
        tell(f"{name}: " + ", ".join(f"{k} {statistics.median(r[k] for r in rounds):.4g}" for k in rounds[0]))
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "figures": figures}, indent=1))
    return 0


class Alone:
    """The engine without HTTP, in this process and this thread."""

    def __init__(self, threads: int) -> None:
        settings = Settings(demo=True, threads=threads)
        one = RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, node="", init="")
        ready = host.prepare(settings, one)
        torch.set_num_threads(threads)
        context = ParallelContext(device=ready.device)
        worker = host.load(ready, context, settings)
        self.engine: Engine = host.make_engine(settings, ready, worker, Channel(context))

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


def _latency_round(alone: Alone, order: Order) -> dict[str, float]:
    """Units: milliseconds."""
    engine = sorted(alone.complete(1, 1) * 1e3 for _ in range(300))
    http = sorted(s * 1e3 for s in order(_requests(1, 300))["seconds"])
    at = int(0.99 * 300)
    return {
        "engine_p50_ms": engine[150],
        "http_p50_ms": http[150],
        "added_p50_ms": http[150] - engine[150],
        "engine_p99_ms": engine[at],
        "http_p99_ms": http[at],
        "added_p99_ms": http[at] - engine[at],
    }


def _requests_round(order: Order, pid: int, connections: int, num_each: int) -> dict[str, float]:
    before = cpu_seconds(pid)
    said = order(_requests(connections, num_each))
    num = len(said["seconds"])
    return {
        "per_s": num / said["wall"],
        "p50_ms": statistics.median(said["seconds"]) * 1e3,
        "server_cpu_ms_each": (cpu_seconds(pid) - before) / num * 1e3,
        "client_cpu_ms_each": said["cpu"] / num * 1e3,
    }


def _streams_round(alone: Alone, order: Order, pid: int, num: int, max_tokens: int) -> dict[str, float]:
    cpu = time.process_time()
    engine_s = alone.complete(num, max_tokens)
    engine_cpu, before = time.process_time() - cpu, cpu_seconds(pid)
    bodies = [{**_body(p, max_tokens), "stream": True} for p in _prompts(num)]
    said = order({"what": "streams", "bodies": bodies})
    http_s, tokens = max(said["seconds"]), num * max_tokens
    return {
        "engine_per_s": tokens / engine_s,
        "http_per_s": tokens / http_s,
        "ratio": engine_s / http_s,
        "engine_cpu_us_each": engine_cpu / tokens * 1e6,
        "server_cpu_us_each": (cpu_seconds(pid) - before) / tokens * 1e6,
        "client_cpu_us_each": said["cpu"] / tokens * 1e6,
    }


def _prompts(num: int) -> list[list[int]]:
    r = random.Random(1)
    return [[r.randrange(4, 2000) for _ in range(PROMPT_LEN)] for _ in range(num)]


def _body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def _requests(num: int, num_each: int) -> dict[str, Any]:
    return {"what": "requests", "bodies": [_body(p, 1) for p in _prompts(num)], "num_each": num_each}


Order = Callable[[Mapping[str, Any]], dict[str, Any]]


@contextmanager
def service(threads: int) -> Iterator[tuple[int, int]]:
    """The service on the demo model: its process and its port."""
    door = [sys.executable, "-P", "-m"] if sys.version_info >= (3, 11) else [sys.executable, "-m"]
    command = [*door, "metaseq_api.cli.interactive_hosted", "--port", "0", "--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"ready on http://[^:]+:(\d+)/", line):
                    break
            else:
                raise RuntimeError("the service did not start:\n" + "".join(lines))
            with _drained(process.stderr):
                yield process.pid, int(found[1])
                process.terminate()
        finally:
            process.terminate()


@contextmanager
def _drained(lines: Iterator[str]) -> Iterator[None]:
    """Read on, so that the service's log finds room."""
    import threading

    thread = threading.Thread(target=lambda: [None for _ in lines], daemon=True)
    thread.start()
    yield
    thread.join(10)


@contextmanager
def load(port: int) -> Iterator[Order]:
    """A process of clients that does what it is ordered and says how long that took."""
    command = [sys.executable, "-c", f"from metaseq_api.bench.load import child; child('127.0.0.1', {port})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        to, back = process.stdin, process.stdout

        def order(what: Mapping[str, Any]) -> dict[str, Any]:
            to.write(json.dumps(what) + "\n")
            to.flush()
            said: dict[str, Any] = json.loads(back.readline())
            return said

        yield order
        to.close()


def cpu_seconds(pid: int) -> float:
    """What a process and all below it have used. Source: /proc/PID/stat, fields 14 and 15, in ticks."""
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = int(used[11]) + int(used[12])
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in below)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(prog="metaseq_api.bench.http", description="Measure what HTTP costs.")
    add_arguments(parser)
    return run(parser.parse_args(argv), lambda line: sys.stdout.write(line + "\n"))


if __name__ == "__main__":
    sys.exit(main())
