"""The library of `cpu/`, compiled on the machine that runs it, once.

It lies in the user's cache folder, named by source, compiler and processor, so that a second start finds it. Knows
compilers and folders. Does not know what the library holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metaseq_api.machine import cache_home, num_cores

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
# sums in another order, no more: -ffast-math would have every thread of the process take denormal numbers for 0
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
# what a processor without tiles lacks is compiled all the same, and not called
_TILES = ("-mamx-tile", "-mamx-bf16", "-mavx512bf16")
FLAGS = ("-O3", "-march=native", *_TILES, *_MATH, "-pthread", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 60.0
SCRATCH = "metaseq-api-native-"


def compiled() -> Path:
    """The library's path. Raises: OSError, SubprocessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (gcc or clang) on the PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE_S).stdout
    sources = sorted(SOURCES.glob("*.[ch]"))
    about = (*(path.read_bytes() for path in sources), " ".join(FLAGS).encode(), version, _processor())
    path = _folder() / f"native-{hashlib.sha256(b'/'.join(about)).hexdigest()[:16]}.so"
    if not path.exists():
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # ranks that start together do it each
            made = Path(scratch, path.name)
            _build(compiler, [p for p in sources if p.suffix == ".c"], made)
            with made.open("rb") as whole:
                os.fsync(whole.fileno())
            with contextlib.suppress(FileExistsError):  # who is second leaves the first one's: it may be in use
                os.link(made, path)
        log.info("compiled kernels for this CPU in %.1f s", time.monotonic() - began)
    return path


def _build(compiler: str, sources: Sequence[Path], made: Path) -> None:
    """Every file by itself, on all cores, then the whole."""

    def run(*given: str) -> None:
        subprocess.run([compiler, *FLAGS, *given], capture_output=True, check=True, timeout=PATIENCE_S)

    def compile_one(source: Path) -> str:
        run("-c", str(source), "-o", str(part := made.with_name(f"{source.stem}.o")))
        return str(part)

    with ThreadPoolExecutor(num_cores()) as pool:
        parts = list(pool.map(compile_one, sources))
    run("-shared", *parts, "-o", str(made))


def _folder() -> Path:
    """Where libraries are kept: the user's, or where that cannot be written, this process's alone."""
    try:
        folder = cache_home() / "metaseq-api"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and all(_is_ours(place) for place in (folder, folder.parent)):
            return folder
    except (OSError, RuntimeError) as e:
        log.info("no cache folder: %s", e)
    return Path(tempfile.mkdtemp(prefix=SCRATCH))


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a file there: what lies in it is run."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _processor() -> bytes:
    """What this machine's first processor can do."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith(b"flags")), b"")
