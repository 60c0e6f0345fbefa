"""Where a text ends: at the first whole stop string, wherever tokens or pieces cut it.

Knows text. Does not know tokens.
"""

from __future__ import annotations


class StopChecker:
    """Watches one sequence's text grow, piece by piece."""

    def __init__(self, stop: tuple[str, ...], *, include: bool = False) -> None:
        """include: whether the text keeps the stop string it ends at."""
        self._stop, self._include = stop, include
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self._seen = 0  # characters before which no stop string begins
        self._held = 0  # where the part of the text that may begin a stop string begins; it only grows
        self._past = 0  # where the text ended when a stop string was last forbidden

    @property
    def text(self) -> str:
        return self._text

    def push(self, piece: str, *, check: bool = True) -> bool:
        """Append a piece; True if a stop string is complete, and the text then ends before it (or behind it).

        Of several, the one that begins first counts, and of these the shortest. With check False the piece only is
        appended (min_tokens).
        """
        self._text += piece
        if not check or not self._stop:
            self._past = len(self._text)
            return False
        places = ((self._text.find(s, max(self._seen, self._past - len(s) + 1)), len(s)) for s in self._stop)
        found = [place for place in places if place[0] >= 0]
        if found:
            at, length = min(found)
            self._text = self._text[: at + length if self._include else at]
            return True
        self._seen = max(self._seen, len(self._text) - self._longest + 1)
        return False

    @property
    def num_safe(self) -> int:
        """Characters of the text that no later piece can take back: what a stream may send now."""
        if self._include or not self._stop:
            return len(self._text)
        for at in range(max(self._held, len(self._text) - self._longest + 1), len(self._text)):
            tail = self._text[at:]
            if any(len(tail) < len(s) and s.startswith(tail) for s in self._stop):
                self._held = at
                return at
        self._held = len(self._text)
        return self._held
