"""What is kept of a run: its figures with the command, the machine, the commit and the versions that made them.

Also the page that is quoted (docs/performance.md): its tables stand between two marks that name a run, and are written
anew from that run's file; what was not run again stays as it is, with its commit and date. Knows files. Does not know
what was measured.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metaseq_api import __version__
from metaseq_api.bench.figures import as_markdown
from metaseq_api.errors import ResourceError, SettingsError
from metaseq_api.machine import num_cores

MARK = re.compile(r"<!-- run (?P<name>[\w.-]+) -->\n.*?<!-- end -->\n", re.DOTALL)
REPO = Path(__file__).parents[2]
NOWHERE = ("--json", "--plot")
KEPT = {"command", "date", "machine", "commit", "versions", "headline", "table", "figures"}
PLACES = {"--harness": "HARNESS", "--work": "WORK"}


def make(argv: Sequence[str], lines: Sequence[Sequence[str]], figures: object, *, headline: str = "") -> dict[str, Any]:
    """All that is kept, as JSON knows it. `lines`: the table, its head first."""
    return {
        "command": shlex.join(["metaseq-api-bench", *_told(argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "commit": commit(),
        "versions": versions(),
        "headline": headline,
        "table": [list(line) for line in lines],
        "figures": figures,
    }


def _told(argv: Sequence[str]) -> list[str]:
    """The command without where its figures went, which changes nothing, and without the places of this machine."""
    told, words = [], iter(argv)
    for word in words:
        flag, is_one, _ = word.partition("=")
        if flag in (*NOWHERE, *PLACES) and not is_one:
            next(words, None)  # its value
        if flag in PLACES:
            told += [flag, PLACES[flag]]
        elif flag not in NOWHERE:
            told.append(word)
    return told


def machine() -> str:
    """In words: the processor and the cores this process may use; the GPU where torch sees one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags][:1]
    virtual = ", a virtual machine" if "hypervisor" in flags else ""
    told = f"{num_cores()} cores of {name} ({', '.join(known)}{virtual})"
    return f"{torch.cuda.get_device_name()}; {told}" if torch.cuda.is_available() else told


def versions() -> dict[str, str]:
    """Of what was measured, ours and theirs; the rival's only where it took part."""
    out = {"metaseq-api": __version__, "Python": sys.version.split()[0], "torch": torch.__version__}
    if "transformers" in sys.modules:
        try:
            out["transformers"] = version("transformers")
        except PackageNotFoundError:
            out["transformers"] = "unknown"
    return out


def commit() -> str:
    """Of the checkout that this file is in, marked where it was changed since; "unknown" elsewhere."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPO), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_place(path: Path, flag: str) -> None:
    """Make the folder of a file that is written at the end. Raises: SettingsError where it could not be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        part = _part(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise SettingsError(f"{flag} {path} cannot be written ({error.strerror}); name another file") from None


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write(text: str, path: Path) -> None:
    """Keep it; a reader never finds half of it. Raises: ResourceError."""
    part = _part(path)
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error.strerror}); make room, or name another file") from None


def rendered(report: dict[str, Any]) -> str:
    """A run as it stands on the page."""
    names = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    more = f" {report['headline'][:1].upper()}{report['headline'][1:]}." if report["headline"] else ""
    lines = [
        f"    {report['command']}",
        "",
        f"{report['machine']}; commit {report['commit']}, {report['date']}; {names}.{more}",
        "",
    ]
    return "\n".join([*lines, *as_markdown(report["table"])]) + "\n"


def fill(page: str, runs: dict[str, dict[str, Any]]) -> str:
    """The page with every marked place written from the run of its name, if there is one. Raises: SettingsError."""
    marked = {found["name"] for found in MARK.finditer(page)}
    if unknown := sorted(runs.keys() - marked):
        raise SettingsError(
            f"the page has no place for {', '.join(unknown)}; add <!-- run {unknown[0]} --> and <!-- end -->"
        )

    def one(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- run {name} -->\n\n{rendered(runs[name])}\n<!-- end -->\n" if name in runs else found[0]

    return MARK.sub(one, page)


def read_page(path: Path) -> str:
    """Raises: SettingsError."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read as a page ({error}); name a Markdown file") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text("utf-8"))
        if not isinstance(run, dict) or not run.keys() >= KEPT:
            raise ValueError("it is not what --json writes")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} holds no run ({error}); measure again, or take it out") from None
    return run


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every run that is kept in a folder, by the name of its file. Raises: SettingsError where there is none."""
    runs = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    if not runs:
        raise SettingsError(f"no run is kept in {folder} (*.json); make bench writes them there")
    return runs
