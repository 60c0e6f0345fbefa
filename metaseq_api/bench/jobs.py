"""What each word of metaseq-api-bench does, from its flags to an Outcome. Does not print, and keeps no file.

`page` is not one of them: it measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch

from metaseq_api import settings
from metaseq_api.bench import http, latency, limits, load, reshard, rivals, serve, startup, throughput
from metaseq_api.bench.figures import SIDES, Row, cells, shown
from metaseq_api.bench.plot import Points
from metaseq_api.bench.services import clients, service
from metaseq_api.bench.subject import Ours, Subject, ours, split, subject, theirs
from metaseq_api.bench.work import Generate, Sampling, Times, by_engine, by_peer
from metaseq_api.core import ModelConfig
from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.errors import SettingsError
from metaseq_api.machine import num_cores
from metaseq_api.settings import DEMO, Settings

Args = argparse.Namespace
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job found: a table, its head first; all figures; a line above; what may be plotted."""

    lines: list[list[str]]
    figures: object
    headline: str = ""
    curves: Mapping[str, Points] = field(default_factory=dict)
    roofline: Points = ()


def measure_latency(args: Args, say: Say) -> Outcome:
    asked = latency.Load(
        rounds=args.rounds, prompt_len=args.prompt_len, new_tokens=args.new_tokens, prefill_len=args.prefill_len
    )
    of = _subject(args)
    config = _look(of, args)
    _check_window(config, args.prompt_len + args.new_tokens, "--prompt-len or --new-tokens")
    _check_window(config, args.prefill_len + 1, "--prefill-len")
    made = ours(of)
    with _sides(of, made, args) as sides:
        rows, probes = latency.measure(sides, made.ready, asked, say)
    best = f"{shown(max(probes) / 1e9)} GB/s, the best of {len(probes)} probes of this run"
    kept = {"rows": _kept(rows), "bandwidth_bytes_per_s": probes}
    return Outcome(lines=cells(rows), figures=kept, headline=f"bandwidth: {best}")


def measure_throughput(args: Args, say: Say) -> Outcome:
    _check_lengths(args)
    if args.top_p != 1 and not args.temperature:
        raise SettingsError(f"--top-p {args.top_p:g} changes nothing without a --temperature above 0; give one too")
    asked = throughput.Load(
        rounds=args.rounds,
        requests=tuple(args.requests),
        new_tokens=args.new_tokens,
        shortest=args.shortest,
        longest=args.longest,
    )
    of = _subject(args, max_batch_size=max(256, *args.requests), max_queue=max(4096, *args.requests))
    _check_window(_look(of, args), args.longest + args.new_tokens, "--longest or --new-tokens")
    made = ours(of)
    probes = limits.Probes(made.ready.device, made.ready.dtype, made.ready.threads)
    with _sides(of, made, args) as sides:
        levels = throughput.measure(sides, asked, say, probes.take)
    roof = probes.roofline(made.ready.config, _context_len(args))
    rows = [row for level in levels for row in level.rows]
    return Outcome(
        lines=cells(rows),
        figures={"rows": _kept(rows)} | _limits(roof),
        headline=_told(roof),
        curves={SIDES[side]: throughput.points(levels, side) for side in sides},
        roofline=roof.points(max(args.requests)),
    )


def measure_serve(args: Args, say: Say) -> Outcome:
    _check_lengths(args)
    key = settings.api_key()
    asked = serve.Load(
        concurrency=tuple(args.concurrency or (() if args.rate else (1, 4, 16))),
        rates=tuple(args.rate or ()),
        requests=args.requests,
        new_tokens=args.new_tokens,
        shortest=args.shortest,
        longest=args.longest,
        seed=args.seed,
        ttft_ms=args.ttft_ms,
        tpot_ms=args.tpot_ms,
        model=args.model,
        headers=("Connection: close", *([f"Authorization: Bearer {key}"] if key else [])),
    )
    if args.url:
        with clients(*_address(args.url)) as order:
            levels, roof = serve.measure(order, asked, say, lambda: None), None
    else:
        of = _subject(args)
        config, dtype, device = of.look()
        _check_window(config, args.longest + args.new_tokens, "--longest or --new-tokens")
        config.check_parallel(of.settings.model_parallel or 1)
        probes = limits.Probes(device, dtype, of.settings.threads or num_cores())
        probes.take()
        with service(of) as running, clients(running.host, running.port) as order:
            levels = serve.measure(order, asked, say, probes.take)
        roof = probes.roofline(config, _context_len(args))
    return Outcome(
        lines=serve.cells(levels, asked),
        figures={"levels": [dataclasses.asdict(level) for level in levels]} | (_limits(roof) if roof else {}),
        headline=_told(roof) if roof else "",
        curves={args.url or "metaseq-api": serve.points(levels)},
        roofline=roof.points(max(asked.concurrency or (16,))) if roof else (),
    )


def measure_startup(args: Args, say: Say) -> Outcome:
    of = _subject(args)
    of.look()[0].check_parallel(of.settings.model_parallel or 1)
    starts = startup.measure(of, args.starts, say)
    return Outcome(lines=startup.cells(starts), figures=[dataclasses.asdict(start) for start in starts])


def measure_http(args: Args, say: Say) -> Outcome:
    asked = http.Load(
        rounds=args.rounds,
        streams=args.streams,
        tokens=args.new_tokens,
        connections=args.connections,
        requests=args.requests,
    )
    rows = http.measure(_subject(args), asked, say)
    return Outcome(lines=cells(rows), figures=_kept(rows))


def measure_reshard(args: Args, say: Say) -> Outcome:
    found = reshard.measure(args.folder, OPT_SHAPES[args.shape], args.shards, args.rounds, say)
    total = sum(path.stat().st_size for path in args.folder.glob("*shard*.pt"))
    return Outcome(
        lines=reshard.cells(found),
        figures={way: [dataclasses.asdict(run) for run in runs] for way, runs in found.items()},
        headline=f"{args.shape}, {args.shards} shards of {total / 1e9:.2f} GB in all, optimizer state left out",
    )


def measure_load(args: Args, say: Say) -> Outcome:
    for num in args.ranks:
        OPT_SHAPES[args.shape].check_parallel(num, "--ranks")
    files = load.make(args.folder, OPT_SHAPES[args.shape], args.layouts, say)
    found = load.measure(files, args.ranks, args.rounds, args.dtype, say)
    total = sum(path.stat().st_size for path in files[args.layouts[0]])
    how = f"load: to compute in {args.dtype} on the CPU, once, packing included"
    return Outcome(
        lines=load.cells(found),
        figures={" ".join(map(str, key)): [dataclasses.asdict(run) for run in runs] for key, runs in found.items()},
        headline=f"{args.shape}, fp16 files of {total / 1e9:.2f} GB; {how}",
    )


def measure_rivals(args: Args, say: Say) -> Outcome:
    asked = rivals.Asked(
        harness=args.harness,
        work=args.work,
        model=args.shape.removeprefix("opt-"),
        dtype=args.dtype,
        rivals=tuple(args.rivals),
        serving=tuple(args.serving),
        rounds=args.rounds,
    )
    found = rivals.measure(asked, say)
    return Outcome(lines=rivals.cells(found.rows), figures=_kept(found.rows), headline=found.told())


JOBS: Mapping[str, Callable[[Args, Say], Outcome]] = {
    "latency": measure_latency,
    "throughput": measure_throughput,
    "serve": measure_serve,
    "startup": measure_startup,
    "http": measure_http,
    "reshard": measure_reshard,
    "load": measure_load,
    "rivals": measure_rivals,
}


def _subject(args: Args, **more: Any) -> Subject:
    """What the flags name, else the job's own default, else the demo."""
    shape = args.shape or (None if args.checkpoint else args.otherwise)
    threads = args.threads or num_cores()
    told = Settings(dtype=args.dtype, device=args.device, threads=threads, **more)
    told = dataclasses.replace(told, model_parallel=getattr(args, "model_parallel", None) or 1)
    return subject(shape, args.checkpoint or (None if shape else DEMO), told)


def _look(of: Subject, args: Args) -> ModelConfig:
    """What will be loaded. Raises: CheckpointError, ParallelSizeError."""
    config = of.look()[0]
    if args.ranks is not None:
        config.check_parallel(args.ranks, "--ranks")
    return config


@contextlib.contextmanager
def _sides(of: Subject, made: Ours, args: Args) -> Iterator[dict[str, Generate]]:
    """All in this thread: a second one that computes would slow both."""
    how = Sampling(temperature=getattr(args, "temperature", 0.0), top_p=getattr(args, "top_p", 1.0))
    sides = {"ours": _with_threads(made, by_engine(made.engine, how=how))}
    with contextlib.ExitStack() as stack:
        if args.ranks is not None:
            shared = stack.enter_context(split(of, args.ranks))
            sides["split"] = _with_threads(shared, by_engine(shared.engine, how=how))
        if args.against == "hf":
            sides["hf"] = _with_threads(made, by_peer(theirs(made.ready), how=how))
        yield sides


def _with_threads(made: Ours, generate: Generate) -> Generate:
    """Every side has its own number of them."""

    def with_them(prompts: list[list[int]], num: int) -> Times:
        torch.set_num_threads(made.ready.threads)
        return generate(prompts, num)

    return with_them


def _check_window(config: ModelConfig, wanted: int, flags: str) -> None:
    """Raises: SettingsError where prompt and answer do not fit the model."""
    if wanted > config.max_positions:
        raise SettingsError(
            f"{wanted} tokens of prompt and answer were asked for, and this model's window is {config.max_positions}; "
            f"lower {flags}"
        )


def _check_lengths(args: Args) -> None:
    """Raises: SettingsError where the shortest prompt would be longer than the longest."""
    if args.shortest > args.longest:
        raise SettingsError(f"--shortest {args.shortest} is more than --longest {args.longest}; give both")


def _context_len(args: Args) -> int:
    """In the middle of an answer to a middling prompt. Units: tokens."""
    middle: int = (args.shortest + args.longest + args.new_tokens) // 2
    return middle


def _limits(roof: limits.Roofline) -> dict[str, float]:
    return {"bandwidth_bytes_per_s": roof.bandwidth, "operations_per_s": roof.operations}


def _told(roof: limits.Roofline) -> str:
    rates = f"{shown(roof.bandwidth / 1e9)} GB/s, {shown(roof.operations / 1e9)} GFLOP/s"
    return f"limits: {rates}, the best of this run's probes"


def _kept(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise SettingsError(
            f"--url {url}: what is measured is plain HTTP, as http://host:port; tunnel to it where it is not"
        )
    return parts.hostname, parts.port or 80
