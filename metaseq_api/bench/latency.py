"""One stream: how long until the first token, how long for each token after it, and how near that is to the bandwidth.

Sides take turns within a round, so that both meet the same machine, and the bandwidth is probed beside them. Does not
print.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metaseq_api.bench.figures import Row
from metaseq_api.bench.gpu_speed import token_bytes
from metaseq_api.bench.limits import bandwidth
from metaseq_api.bench.work import Generate, prompt
from metaseq_api.rank import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of each side. Units: tokens. tries: of the long prompt, of which a round takes the median."""

    rounds: int = 3
    prompt_len: int = 128
    new_tokens: int = 128
    prefill_len: int = 1024
    tries: int = 3


def measure(
    sides: Mapping[str, Generate], ready: Prepared, load: Load, say: Callable[[str], object]
) -> tuple[list[Row], list[float]]:
    """The rows, and every probe of the bandwidth in B/s."""
    first = Row(what=f"first token of a prompt of {load.prompt_len}", unit="ms", less=True)
    each = Row(what=f"each of {load.new_tokens - 1} tokens after it", unit="ms", less=True)
    rate = Row(what="decode", unit="tokens/s")
    prefill = Row(what=f"prefill of {load.prefill_len}", unit="tokens/s")
    share = Row(what="decode, of the best bandwidth", unit="share")
    beside = Row(what="decode, of the bandwidth beside it", unit="share")
    probes: list[float] = []
    _warm(sides, load)
    for turn in range(load.rounds):
        for side, generate in sides.items():
            probes.append(bandwidth(ready.device, ready.threads))
            times = generate([prompt(load.prompt_len, f"a{turn}")], load.new_tokens)
            first.add(side, times.first * 1e3)
            rate.add(side, times.rate_after(load.new_tokens))
            each.add(side, 1e3 / times.rate_after(load.new_tokens))
        probes.append(bandwidth(ready.device, ready.threads))
        for side, generate in sides.items():
            tries = [generate([prompt(load.prefill_len, f"b{turn}{i}")], 1).first for i in range(load.tries)]
            prefill.add(side, load.prefill_len / statistics.median(tries))
        say(f"round {turn + 1} of {load.rounds} done")
    middle = load.prompt_len + load.new_tokens // 2
    for at, (side, steps) in enumerate(each.values.items()):
        num_bytes = token_bytes(ready.config, ready.dtype, middle, kept=None if side == "hf" else ready.kept)
        for turn, ms in enumerate(steps):  # once all probes are known
            before = turn * (len(sides) + 1) + at
            share.add(side, num_bytes / ms * 1e3 / max(probes))
            beside.add(side, num_bytes / ms * 1e3 / statistics.mean(probes[before : before + 2]))
    return [first, each, rate, share, beside, prefill], probes


def _warm(sides: Mapping[str, Generate], load: Load) -> None:
    for generate in sides.values():
        generate([prompt(load.prompt_len, "warm")], min(8, load.new_tokens))
        generate([prompt(load.prefill_len, "warm")], 1)
