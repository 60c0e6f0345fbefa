"""What the doors on checkpoints share: metaseq's spelling of flags, and the files that patterns name.

Does not know what a door does.
"""

from __future__ import annotations

import argparse
import glob
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from metaseq_api import flags, log
from metaseq_api.errors import CheckpointNotFound, SettingsError
from metaseq_api.machine import available_bytes, num_cores

PART = "{part}"
MAX_THREADS = 8
THREAD_BYTES = 1 << 29
"""Units: bytes; a thread takes a few blocks of write.CHUNK, and the kernel likes some to cache."""


class Parser(flags.Parser):
    """Takes `--like-this` and `--like_this`, as python-fire did for metaseq."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(arg) for arg in given], namespace)

    def add_switch(self, flag: str, default: bool | None, help_: str) -> None:
        """Add a flag that takes True or False, or nothing for True."""
        self.add_argument(flag, nargs="?", const=True, default=default, type=_boolean, metavar="True|False", help=help_)


def _dashed(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --num-threads: how many files are written at a time."""
    parser.add_argument(
        "--num-threads",
        type=flags.count,
        default=max(1, min(MAX_THREADS, num_cores(), available_bytes() // THREAD_BYTES)),
        metavar="N",
        help="files written at a time; default: what cores and memory allow (here %(default)s)",
    )


def expand(patterns: Sequence[str]) -> list[Path]:
    """List the files that patterns match. Raises: CheckpointNotFound."""
    paths: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not found:
            raise CheckpointNotFound(f"--input {pattern} matches no file; give the path or pattern of existing files")
        paths += map(Path, found)
    return list(dict.fromkeys(paths))


def by_part(patterns: Sequence[str], output: str) -> list[tuple[list[Path], str]]:
    """The inputs and the output of each job: one, or one for each part where `{part}` stands for its number in both.

    Raises: CheckpointNotFound, SettingsError.
    """
    if not any(PART in p for p in (*patterns, output)):
        return [(expand(patterns), output)]
    if PART not in output or not all(PART in p for p in patterns):
        raise SettingsError(f"{PART} must stand in both --input and --output, where it is each part's number")
    found: set[int] = set()
    for pattern in patterns:
        before, _, after = pattern.partition(PART)
        name = re.compile(re.escape(Path(before).name) + r"(\d+)")
        files = (Path(file) for file in glob.glob(before + "*" + after))
        found |= {int(match[1]) for file in files if (match := name.match(file.name))}
    if not found:
        raise CheckpointNotFound(f"--input {patterns[0]} matches no file; {PART} stands for the part's number")
    jobs = [(j, [p.replace(PART, str(j)) for p in patterns]) for j in range(max(found) + 1)]
    return [(expand(inputs), output.replace(PART, str(j))) for j, inputs in jobs]


def guarded(parser: Parser, argv: Sequence[str] | None, job: Callable[[argparse.Namespace], object]) -> int:
    """Run a door's job with what its flags say; returns the exit code."""
    log.setup()
    unfinished = "interrupted; files that were not finished do not have their final name"
    return flags.guarded(parser.prog, lambda: job(parser.parse_args(argv)), unfinished)
