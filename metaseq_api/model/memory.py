"""What a rank needs of memory, and how many cache blocks that leaves. Asked before anything is read.

Knows bytes. Does not know where they are allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from metaseq_api.core import ModelConfig
from metaseq_api.errors import MemoryTooSmall
from metaseq_api.model.cache import KVCache
from metaseq_api.settings import Settings

GIB = 1 << 30
CPU_CACHE_BYTES = 4 * GIB
"""What the cache takes of a CPU rank's memory unless constants.py says otherwise; pages are taken when first used."""
GPU_SHARE = 0.9
"""Share of a GPU's free memory that weights and cache may take; the rest is for activations and the allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Units: bytes of one rank; blocks of the cache."""

    weight_bytes: int
    block_bytes: int
    num_blocks: int


def plan(
    config: ModelConfig,
    settings: Settings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tensor_size: int,
    ranks_here: int,
    max_seq_len: int,
) -> Plan:
    """Fit weights and cache into this rank's share of the machine.

    Raises: MemoryTooSmall saying what is there and what is wanted.
    """
    table = config.vocab_size * config.embed_dim
    # two tables where the output is not tied; and a CPU keeps a tied one twice, packed and plain
    params = config.num_params + (table if device.type == "cpu" or not config.tied_output else 0)
    weights = params * dtype.itemsize // tensor_size
    block = KVCache.bytes_per_block(config, tensor_size, dtype, settings.block_size)
    least = -(-max_seq_len // settings.block_size)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
        cache = free - weights
    else:
        free = available_bytes() // ranks_here
        cache = min(free - weights, max(CPU_CACHE_BYTES, least * block))
    asked = settings.cache_tokens and -(-settings.cache_tokens // settings.block_size)
    if asked is not None and asked < least:
        raise MemoryTooSmall(
            f"CACHE_TOKENS is {settings.cache_tokens}, less than one sequence of {max_seq_len}; "
            "raise it or lower MAX_SEQ_LEN"
        )
    if weights + (asked or least) * block > free:
        split = "split the model further (--model-parallel), or take a smaller --dtype or --max-seq-len"
        raise MemoryTooSmall(
            f"a rank has {free / GIB:.2f} GiB free on {device} and needs {weights / GIB:.2f} GiB for weights and "
            f"{(asked or least) * block / GIB:.2f} GiB for {'CACHE_TOKENS' if asked else 'one sequence'}; "
            + ("lower CACHE_TOKENS" if asked and asked > least else split)
        )
    return Plan(weight_bytes=weights, block_bytes=block, num_blocks=asked or cache // block)


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
