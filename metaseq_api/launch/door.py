"""What the doors to a cluster share: a parser that explains, and sbatch's options as their own.

Knows flags. Does not know what a door does with them.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from metaseq_api.errors import SettingsError
from metaseq_api.launch import sbatch


class Parser(argparse.ArgumentParser):
    known: ClassVar[Sequence[str]] = ()
    """Those of every command."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line, with the option that was probably meant, or what to do instead."""
        hints = []
        for word in re.findall(r"(?<!\S)--?[\w-]+", message.partition("unrecognized arguments: ")[2]):
            name = word.lstrip("-")
            near = difflib.get_close_matches(word, self.known, n=1)
            if name in sbatch.OURS:
                hints.append(f"{word} is not passed on to sbatch: {sbatch.OURS[name]}")
            elif near:
                hints.append(f"did you mean {near[0]}?")
        raise SettingsError("; ".join([message, *hints, "see --help"]))


def add_sbatch(parser: argparse.ArgumentParser) -> None:
    """Add every option of sbatch that a service leaves to its user; `sbatch_options` finds what was given."""
    names = "options of sbatch, passed on as they are"
    group = parser.add_argument_group(
        names, " ".join(f"--{n}" for n in sorted([*sbatch.VALUED, *sbatch.OPTIONAL, *sbatch.BARE]))
    )
    for name in (*sbatch.VALUED, *sbatch.OPTIONAL, *sbatch.BARE):
        flags = [f"--{name}", *([f"-{sbatch.SHORT[name]}"] if name in sbatch.SHORT else [])]
        keep = {"dest": f"sbatch {name}", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if name in sbatch.VALUED:
            group.add_argument(*flags, **keep)  # type: ignore[arg-type]
        elif name in sbatch.OPTIONAL:
            group.add_argument(*flags, nargs="?", **keep)  # type: ignore[arg-type]
        else:
            group.add_argument(*flags, action="store_const", const=None, **keep)  # type: ignore[arg-type]


def sbatch_options(args: argparse.Namespace) -> dict[str, str | None]:
    """Those of sbatch's options that were given, by name; None for one without a value."""
    return {k.removeprefix("sbatch "): v for k, v in vars(args).items() if k.startswith("sbatch ")}


def count(text: str) -> int:
    """A number from 1 on, as argparse reads one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
