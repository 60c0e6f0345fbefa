"""What a rank needs of memory, and how many cache blocks that leaves. Asked before anything is read.

Knows bytes. Does not know where they are allocated.
"""

from __future__ import annotations

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
    # a CPU keeps the tied table twice: plain to look tokens up, packed to make logits
    params = config.num_params + (table if device.type == "cpu" and config.tied_output else 0)
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
        raise MemoryTooSmall(
            f"a rank has {free / GIB:.2f} GiB free on {device} and needs {weights / GIB:.2f} GiB for weights and "
            f"{(asked or least) * block / GIB:.2f} GiB for {'CACHE_TOKENS' if asked else 'one sequence'}; split the "
            "model further (--model-parallel), or take a smaller --dtype or --max-seq-len"
        )
    return Plan(weight_bytes=weights, block_bytes=block, num_blocks=asked or cache // block)


def available_bytes() -> int:
    """Memory this process may still take: the machine's, or what its control group (SLURM's --mem) leaves.

    Source: /proc/meminfo, cgroup v2's memory.max and memory.current.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup") / _cgroup().lstrip("/")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def _cgroup() -> str:
    path = Path("/proc/self/cgroup")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line[3:] for line in lines if line.startswith("0::")), "")
