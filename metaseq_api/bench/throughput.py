"""Many requests at once, without HTTP: output tokens a second, the prompts' time in it; and both phases on their own.

Prompts are of unlike lengths, the same for every side. The first phase is over when the last request has its first
token: what others had more by then counts for neither phase, and makes a side that mixes them look slower in the first.
Sides take turns within a round. Does not print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from metaseq_api.bench.figures import Row
from metaseq_api.bench.work import LONGEST, SHORTEST, Generate, mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of each side. Units: tokens; requests that are made at once, one number after the other."""

    rounds: int = 3
    requests: tuple[int, ...] = (32,)
    new_tokens: int = 128
    shortest: int = SHORTEST
    longest: int = LONGEST

    def prompts(self, num: int, seed: str) -> list[list[int]]:
        return mixed(num, seed, self.shortest, self.longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """So many requests at once. `all`: output tokens a second from the first prompt to the last token."""

    num: int
    all: Row
    prefill: Row
    decode: Row
    step: Row

    @property
    def rows(self) -> list[Row]:
        return [self.all, self.prefill, self.decode, self.step]


def measure(
    sides: Mapping[str, Generate], load: Load, say: Callable[[str], object], probe: Callable[[], object]
) -> list[Level]:
    """Every level, in turns; the machine is probed before each."""
    levels = [_level(num, load) for num in load.requests]
    for generate in sides.values():
        generate(load.prompts(max(load.requests), "warm"), 4)
    for turn in range(load.rounds):
        for level in levels:
            probe()
            for side, generate in sides.items():
                _once(level, side, generate, load, str(turn))
        say(f"round {turn + 1} of {load.rounds} done")
    return levels


def _level(num: int, load: Load) -> Level:
    what = f"{num} at once"
    return Level(
        num=num,
        all=Row(what=f"{what}, prompts of {load.shortest}-{load.longest} + {load.new_tokens}: output", unit="tokens/s"),
        prefill=Row(what=f"{what}: prompts alone", unit="tokens/s"),
        decode=Row(what=f"{what}: decode alone", unit="tokens/s"),
        step=Row(what=f"{what}: each token of a stream", unit="ms", less=True),
    )


def _once(level: Level, side: str, generate: Generate, load: Load, turn: str) -> None:
    num, prompts = level.num, load.prompts(level.num, turn)
    times = generate(prompts, load.new_tokens)
    rate = times.rate_after(num * load.new_tokens)
    level.all.add(side, num * load.new_tokens / times.whole)
    level.prefill.add(side, sum(map(len, prompts)) / times.first)
    level.decode.add(side, rate)
    level.step.add(side, 1e3 * num / rate)


def points(levels: Sequence[Level], side: str) -> list[tuple[float, float]]:
    """Seconds a token of a stream and tokens a second of all: what is plotted."""
    return [(level.step.median(side) / 1e3, level.decode.median(side)) for level in levels]
