"""What this machine is and, or a job's share of it, can still give. Knows /proc and control groups; not who asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AMX = {"amx_tile", "amx_bf16", "avx512_bf16"}
_WAITS = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "1"}  # 250 us by GNU's OpenMP; 1 ms, the least, by Intel's


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def has_avx512(about: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether kernels of our own may serve (`kernels.native`), in fp32 at least."""
    return _features(about) >= _AVX512


def has_amx(about: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether they may in bf16 too: this machine's processors multiply by tiles."""
    return _features(about) >= _AVX512 | _AMX


def _features(about: Path) -> set[str]:
    """What the first processor can do, in Linux's words; nothing elsewhere, from where one may yet ask a server."""
    if not about.exists():
        return set()
    with about.open() as lines:
        return set(next((line for line in lines if line.startswith("flags")), "").split())


def cache_home() -> Path:
    """Where the user keeps what can be made anew. Raises: RuntimeError where nobody knows.

    Source: XDG Base Directory Specification.
    """
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return told if told.is_absolute() else Path.home() / ".cache"


def let_threads_rest() -> None:
    """Where our own kernels compute, have torch's threads sleep soon after there is nothing for them to do.

    By itself OpenMP has them look out for more for 15 ms, on the cores that our threads want. Within 250 us the next of
    torch's own operations comes, so a model that torch computes is as fast. OpenMP asks the environment when torch is
    first imported, so this comes before; whoever has set it himself is left alone.
    """
    if not {"OMP_WAIT_POLICY", *_WAITS} & os.environ.keys() and has_avx512():
        os.environ.update(_WAITS)


def take_large_pages() -> None:
    """Have torch ask for pages of 2 MB for what is as large, where there are any, unless THP_MEM_ALLOC_ENABLE is set.

    A step reads every weight; in pages of 4 KB, which many systems give where nobody asks, finding them took a tenth of
    its time. Torch asks the environment when it first allocates. Source: c10/core/impl/alloc_cpu.cpp.
    """
    if Path("/sys/kernel/mm/transparent_hugepage").exists():  # or torch would warn
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: the machine's, or what its control groups (SLURM's --mem) leave.

    Pages of files that were read count as free, since the kernel gives them up. Source: /proc/meminfo; memory.max and
    memory.current of every group above this process (cgroup v2), or their v1 names.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for group in _control_groups(proc, groups):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used, stat = group / limit_name, group / used_name, group / "memory.stat"
            if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
                cached = [
                    int(n.split()[1]) for n in _lines(stat) if n.startswith(("inactive_file ", "total_inactive_file "))
                ]
                free = min(free, int(text) - int(used.read_text()) + max(cached, default=0))
    return max(free, 0)


def _control_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """The control group of this process and all above it: a limit holds for everything below."""
    for line in _lines(proc / "self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            group = (groups if number == "0" else groups / "memory") / path.lstrip("/")
            yield group
            yield from (p for p in group.parents if p.is_relative_to(groups))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
