"""What a rank needs of memory, and how many cache blocks that leaves. Asked before anything is read.

Knows bytes. Does not know where they are allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metaseq_api.core import ModelConfig
from metaseq_api.errors import MemoryTooSmall
from metaseq_api.machine import available_bytes
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
    step_bytes: int
    block_bytes: int
    num_blocks: int


def plan(
    config: ModelConfig,
    settings: Settings,
    *,
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    tensor_size: int,
    ranks_here: int,
    max_seq_len: int,
) -> Plan:
    """Fit weights, kept in a dtype, and the cache into this rank's share of the machine.

    Raises: MemoryTooSmall saying what is there and what is wanted.
    """
    table = config.vocab_size * config.embed_dim
    # two tables where the output is not tied; and a CPU keeps a tied one twice, packed and plain
    plain = table if device.type == "cpu" or not config.tied_output else 0
    weights = (config.num_params * kept.itemsize + plain * dtype.itemsize) // tensor_size
    block = KVCache.bytes_per_block(config, tensor_size, dtype, settings.block_size)
    least = -(-max_seq_len // settings.block_size)
    if device.type == "cuda":
        free, step = int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE), 0  # a step's is in the rest
        cache = free - weights
    else:
        free, step = available_bytes() // ranks_here, _step_bytes(config, settings.max_batch_tokens, dtype, tensor_size)
        cache = min(free - weights - step, max(CPU_CACHE_BYTES, least * block))
    asked = settings.cache_tokens and -(-settings.cache_tokens // settings.block_size)
    if asked is not None and asked < least:
        raise MemoryTooSmall(
            f"CACHE_TOKENS is {settings.cache_tokens}, less than one sequence of {max_seq_len}; "
            "raise it or lower MAX_SEQ_LEN"
        )
    if weights + step + (asked or least) * block > free:
        split = "split the model further (--model-parallel), or take a smaller --dtype or --max-seq-len"
        raise MemoryTooSmall(
            f"a rank has {free / GIB:.2f} GiB free on {device} and needs {(weights + step) / GIB:.2f} GiB for weights"
            f"{' and the values of a step' if step else ''}, and {(asked or least) * block / GIB:.2f} GiB for "
            f"{'CACHE_TOKENS' if asked else 'one sequence'}; "
            + ("lower CACHE_TOKENS" if asked and asked > least else split)
        )
    return Plan(weight_bytes=weights, step_bytes=step, block_bytes=block, num_blocks=asked or cache // block)


def _step_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype, tensor_size: int) -> int:
    """What a step of so many tokens holds of one layer: its input and norm, q, k, v, attention, and the ffn's rows."""
    width, split = config.hidden_dim, 4 * config.hidden_dim + config.ffn_dim
    return num_tokens * (2 * width + split // tensor_size) * dtype.itemsize
