"""What a measurement is made of: rows of one number a round for each side; medians, ranges, percentiles, ratios.

Knows numbers. Does not know what was measured, or where it is shown.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

SIDES = {"split": "split over ranks", "ours": "ours", "hf": "Hugging Face"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. values: by side, a number for each round. less: whether less is better."""

    what: str
    unit: str
    less: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, side: str, value: float) -> None:
        self.values.setdefault(side, []).append(value)

    def median(self, side: str) -> float:
        return statistics.median(self.values[side])

    def ratio(self, side: str, other: str) -> float | None:
        """How many times better one side is, by the medians; None where one was not measured."""
        if side not in self.values or other not in self.values:
            return None
        mine, its = self.median(side), self.median(other)
        return its / mine if self.less else mine / its


def percentile(numbers: Sequence[float], share: float) -> float:
    """The smallest of the numbers that so great a share of them does not exceed; nan of none."""
    if not numbers:
        return math.nan
    ordered = sorted(numbers)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def shown(number: float) -> str:
    """Three digits, or all that stand before the point."""
    if math.isnan(number):
        return "-"
    digits = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2 if abs(number) >= 1 else 3
    return f"{number:.{digits}f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A head, and a line for each row: medians with the range, and the ratio of each side and the next one."""
    sides = [s for s in SIDES if any(s in row.values for row in rows)]
    pairs = list(itertools.pairwise(sides))
    told = ["ratio"] if pairs == [("ours", "hf")] else [f"{SIDES[a]} / {SIDES[b]}" for a, b in pairs]
    head = ["", "unit", *(SIDES[s] for s in sides), *told]
    lines = [head]
    for row in rows:
        line = [row.what, row.unit]
        for side in sides:
            of = row.values.get(side)
            line.append(f"{shown(statistics.median(of))} ({shown(min(of))}-{shown(max(of))})" if of else "")
        for pair in pairs:
            ratio = row.ratio(*pair)
            line.append("" if ratio is None else f"{ratio:.2f}")
        lines.append(line)
    return lines


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def as_markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """The same as a table of a Markdown page."""
    head, *rest = lines
    marks = ["---", *("--:" for _ in head[1:])]
    return ["| " + " | ".join(line) + " |" for line in (head, marks, *rest)]
