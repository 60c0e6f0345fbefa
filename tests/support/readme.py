"""The README's own commands, so that what it says is what the tests run."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command(begins: str) -> str:
    """The first command of a sh block that begins so, its continuation lines included."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(begins):
                return line.partition("   # ")[0].strip()
    raise AssertionError(f"the README has no command {begins!r}")


def first_answer() -> dict[str, object]:
    """The JSON that the README shows under its first curl."""
    answer: dict[str, object] = json.loads(blocks("json")[0])
    return answer
