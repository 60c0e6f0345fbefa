"""Throughput against latency, with the roofline, as one SVG; each browser and GitHub's pages show it as it is.

Both axes are logarithmic. Knows points and their names. Does not know what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
"""Seconds a token of one stream, and tokens a second of all."""
WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 48, 56
COLORS = ("#0b62a4", "#c2410c", "#15803d", "#7e22ce")
ROOF = "#888888"


@dataclass(frozen=True, slots=True)
class _Axis:
    """From a number to its place. Units: pixels from `start` to `stop`, decades between `low` and `high`."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, numbers: Sequence[float], start: float, stop: float) -> _Axis:
        least, most = math.log10(min(numbers)), math.log10(max(numbers))
        room = max(0.08 * (most - least), 0.05)
        return cls(least - room, most + room, start, stop)

    def place(self, number: float) -> float:
        share = (math.log10(number) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each decade."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        every = (m * 10.0**d for d in decades for m in (1, 2, 5))
        return [tick for tick in every if self.low <= math.log10(tick) <= self.high]


def svg(title: str, series: Mapping[str, Points], roofline: Points = ()) -> str:
    """One curve for each name, and the roofline that none can be above.

    A point at zero (all tokens of an answer were found at once) has no place between decades, and is left out.
    """
    shown = {name: [p for p in points if min(p) > 0] for name, points in series.items()}
    series = {name: points for name, points in shown.items() if points}
    everything = [p for points in (*series.values(), roofline) for p in points]
    assert everything, "nothing to plot"
    x = _Axis.over([1e3 * s for s, _ in everything], LEFT, WIDTH - RIGHT)
    y = _Axis.over([rate for _, rate in everything], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 22, title),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "milliseconds a token of one stream", anchor="middle"),
        _text(20, (TOP + HEIGHT - BOTTOM) / 2, "output tokens a second, all streams", anchor="middle", turned=True),
        *(_tick(x, tick, across=True) for tick in x.ticks()),
        *(_tick(y, tick, across=False) for tick in y.ticks()),
    ]
    for name, points, color in _colored(series, roofline):
        at = [(x.place(1e3 * s), y.place(rate)) for s, rate in points]
        dash = ' stroke-dasharray="6 4"' if color == ROOF else ""
        line = " ".join(f"{left},{top}" for left, top in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        if color != ROOF:
            parts += [f'<circle cx="{left}" cy="{top}" r="3.5" fill="{color}"/>' for left, top in at]
        parts.append(_text(at[-1][0] - 6, at[-1][1] - 8, name, anchor="end", color=color))
    return "\n".join([*parts, "</svg>", ""])


def _colored(series: Mapping[str, Points], roofline: Points) -> list[tuple[str, Points, str]]:
    named = [(name, points, COLORS[i % len(COLORS)]) for i, (name, points) in enumerate(series.items())]
    return [*([("roofline", roofline, ROOF)] if roofline else []), *named]


def _tick(axis: _Axis, number: float, *, across: bool) -> str:
    at, says = axis.place(number), f"{number:g}"
    if across:
        line = f'<line x1="{at}" y1="{TOP}" x2="{at}" y2="{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>'
        return line + _text(at, HEIGHT - BOTTOM + 18, says, anchor="middle")
    line = f'<line x1="{LEFT}" y1="{at}" x2="{WIDTH - RIGHT}" y2="{at}" stroke="#e5e5e5"/>'
    return line + _text(LEFT - 8, at + 4, says, anchor="end")


def _text(
    left: float,
    top: float,
    says: str,
    *,
    anchor: str = "start",
    color: str = "#222",
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {left} {top})"' if turned else ""
    where = f'x="{left}" y="{top}" text-anchor="{anchor}" font-size="12" fill="{color}"'
    return f"<text {where}{turn}>{escape(says)}</text>"
