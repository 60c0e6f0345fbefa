"""How a model is laid over nodes and GPUs, and whether it fits, before anything is submitted.

Knows the model's numbers and what nodes have. Does not know files, torch or SLURM's commands. What a rank needs is
counted as `model.memory` counts it once it runs there, where a test holds the two together; only what a CPU's kernels
save by keeping halves is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from metaseq_api.core import ModelConfig
from metaseq_api.errors import MemoryTooSmall, ParallelSizeError, SettingsError
from metaseq_api.launch.cluster import Node

GIB = 1 << 30
GPU_SHARE = 0.9
"""Share of a GPU's free memory that weights and cache may take, as in `model.memory`."""
DRIVER_BYTES = 1 * GIB
"""What CUDA, NCCL and the kernels take of a GPU before anything is loaded."""
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
# where the type alone tells the memory; a100 and v100 come in two sizes, so those need a feature or --gpu-memory
_KNOWN_GB = {"h100": 80, "h200": 141, "b200": 180, "a40": 48, "a10": 24, "l40": 48, "l40s": 48, "l4": 24, "t4": 16}
_KNOWN_GB |= {"a6000": 48, "a30": 24, "p100": 16, "gh200": 96, "mi250": 64, "mi250x": 64, "mi300x": 192}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What is asked of SLURM and of each rank. Units: bytes of one rank; gpu_bytes None where nothing tells it."""

    nodes: int
    gpus: int
    """GPUs of each node; 0 serves on CPUs."""
    model_parallel: int
    dtype: str
    max_seq_len: int
    weight_bytes: int
    token_bytes: int
    """What one token's keys and values take of a rank."""
    gpu_bytes: int | None

    @property
    def per_node(self) -> int:
        return self.model_parallel // self.nodes

    @property
    def free_bytes(self) -> int | None:
        """What weights and cache may take of a rank's GPU."""
        return None if self.gpu_bytes is None else int((self.gpu_bytes - DRIVER_BYTES) * GPU_SHARE)

    @property
    def least_bytes(self) -> int:
        """Weights and the keys and values of one sequence."""
        return self.weight_bytes + self.max_seq_len * self.token_bytes

    @property
    def fits(self) -> bool | None:
        """Whether a sequence fits beside the weights; None where that is not known."""
        return None if self.free_bytes is None else self.least_bytes <= self.free_bytes

    @property
    def cache_tokens(self) -> int | None:
        """Tokens that all sequences together may hold."""
        return None if self.free_bytes is None else max(self.free_bytes - self.weight_bytes, 0) // self.token_bytes

    def lines(self) -> list[str]:
        """The plan for a person."""
        on = f"{self.per_node} GPU(s)" if self.gpus else f"{self.per_node} CPU rank(s)"
        said = [
            f"tensor parallel over {self.model_parallel} rank(s): {self.nodes} node(s) x {on}, {self.dtype}",
            f"of each rank: weights {self.weight_bytes / GIB:.2f} GiB, one sequence of {self.max_seq_len} tokens "
            f"{self.max_seq_len * self.token_bytes / GIB:.2f} GiB",
        ]
        if self.gpus and self.gpu_bytes is None:
            said.append(
                "whether that fits is not known: no gres or feature tells the GPUs' memory; give --gpu-memory GB"
            )
        elif self.gpu_bytes is not None:
            said.append(
                f"of {self.gpu_bytes / GIB:.0f} GiB a GPU: room for {self.cache_tokens} tokens of all sequences"
            )
        if self.gpus and self.per_node < self.gpus:
            said.append(f"{self.gpus - self.per_node} of {self.gpus} GPUs of each node are left out: not asked for")
        return said


def lay_out(
    config: ModelConfig,
    *,
    nodes: int,
    gpus: int,
    model_parallel: int | None = None,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    gpu_bytes: int | None = None,
) -> Layout:
    """The layout asked for, or the widest that this model allows on so many GPUs.

    Raises: ParallelSizeError, SettingsError; MemoryTooSmall naming the size that would fit.
    """
    if max_seq_len is not None and max_seq_len > config.max_positions:
        raise SettingsError(
            f"--max-seq-len is {max_seq_len}, but this model has {config.max_positions} positions; lower it"
        )
    sizes = [s for s in allowed_sizes(config) if s % nodes == 0]
    most = nodes * gpus
    if model_parallel is None:
        fitting = [s for s in sizes if s <= most] if gpus else sizes[:1]
        if not fitting:
            raise ParallelSizeError(
                f"this model cannot be split evenly over {nodes} nodes; it can be split over "
                f"{', '.join(map(str, allowed_sizes(config)))} ranks, so choose --nodes that divides one of them"
            )
        model_parallel = fitting[-1]
    config.check_parallel(model_parallel)
    if model_parallel % nodes or (gpus and model_parallel > most):
        raise SettingsError(
            f"--model-parallel {model_parallel} does not spread over {nodes} nodes"
            + (f" of {gpus} GPUs; give a multiple of {nodes} up to {most}" if gpus else f"; give a multiple of {nodes}")
        )

    def sized(size: int) -> Layout:
        return _sized(config, nodes, gpus, size, dtype, max_seq_len, gpu_bytes)

    layout = sized(model_parallel)
    if layout.fits is False:
        raise MemoryTooSmall(_too_small(layout, next((s for s in allowed_sizes(config) if sized(s).fits), None)))
    return layout


def _sized(
    config: ModelConfig,
    nodes: int,
    gpus: int,
    size: int,
    dtype: str | None,
    max_seq_len: int | None,
    gpu_bytes: int | None,
) -> Layout:
    dtype = dtype or (config.dtype if gpus else "fp32")
    table = config.vocab_size * config.embed_dim
    # two tables where the output is not tied; and a CPU keeps a tied one twice
    params = config.num_params + (table if not gpus or not config.tied_output else 0)
    return Layout(
        nodes=nodes,
        gpus=gpus,
        model_parallel=size,
        dtype=dtype,
        max_seq_len=max_seq_len or config.max_positions,
        weight_bytes=params * ITEMSIZE[dtype] // size,
        token_bytes=2 * config.num_layers * config.hidden_dim // size * ITEMSIZE[dtype],
        gpu_bytes=gpu_bytes,
    )


def _too_small(layout: Layout, better: int | None) -> str:
    assert layout.free_bytes is not None
    found = (
        f"a rank needs {layout.least_bytes / GIB:.1f} GiB for weights and one sequence, but a GPU has "
        f"{layout.free_bytes / GIB:.1f} GiB for them; "
    )
    if better is None:
        return found + "no tensor-parallel size that this model allows would fit: take larger GPUs or a smaller --dtype"
    if layout.gpus >= better:
        return found + f"--model-parallel {better} would fit on one node"
    return found + f"{better} ranks would fit: --nodes {-(-better // max(layout.gpus, 1))} --model-parallel {better}"


def allowed_sizes(config: ModelConfig) -> list[int]:
    """Tensor-parallel sizes that divide the model's heads, ffn and vocabulary."""

    def divides(size: int) -> bool:
        return not any(n % size for n in (config.num_heads, config.ffn_dim, config.vocab_size))

    return [size for size in range(1, config.num_heads + 1) if divides(size)]


def gpu_memory(nodes: Iterable[Node]) -> int | None:
    """The memory of the smallest GPU of these nodes, where features or gres tell it. Units: bytes."""
    found = [_memory_of(node) for node in nodes if node.gpus]
    return None if not found or None in found else min(f for f in found if f is not None)


def _memory_of(node: Node) -> int | None:
    words = [w.lower() for w in (node.gpu_type, *node.features) if w]
    for word in words:  # a100_80gb, 80gb, v100-32g, gpu_mem:40g; a slice of a GPU says its own
        if match := re.search(r"(?:^|[^0-9a-z.]|\d[gs]\.)(\d{1,3})gi?b?(?![a-z0-9.])", word):
            return int(match[1]) * GIB
    for word in words:
        for part in re.split(r"[^a-z0-9]+", word):
            if part in _KNOWN_GB:
                return _KNOWN_GB[part] * GIB
    return None
