"""What the machine could do at most: bytes and operations a second, measured in the run whose figures they bound.

A decode step reads every weight once, however many sequences share it, and each sequence's keys and values; it
multiplies each weight once for each sequence. So no step is faster than its bytes over the bandwidth, nor than its
operations over the rate of multiplying. A machine's own bandwidth may change from second to second (virtual ones do): a
run probes it many times, and the bound is the best it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from metaseq_api.bench import gpu_speed
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.core import ModelConfig
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.parallel.layers import Linear, kept_in

READ_BYTES = 1 << 29
PROBE_S = 0.25
"""Units: seconds that a probe of the bandwidth takes, at least one reading."""
WIDTH, ROWS = 4096, 1024


def bandwidth(device: torch.device, threads: int) -> float:
    """On a GPU a copy's, read and written bytes counted; on a CPU a sum's, by so many threads. Units: B/s."""
    if device.type == "cuda":
        return gpu_speed.bandwidth(device)
    torch.set_num_threads(threads)  # a side that shares the cores with other ranks leaves fewer
    numbers, best, until = torch.ones(READ_BYTES // 4), float("inf"), time.perf_counter() + PROBE_S
    while best == float("inf") or time.perf_counter() < until:
        best = min(best, gpu_speed.seconds(numbers.sum, device))
    return READ_BYTES / best


def multiplying(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions of a wide layer of ours at many rows. Units: operations/s."""
    layer = Linear(ParallelContext(device=device), dtype)
    layer.keep(torch.full((WIDTH, WIDTH), 0.01), None)
    rows = torch.ones(ROWS, WIDTH, dtype=dtype, device=device)
    with torch.inference_mode():
        spent = min(gpu_speed.seconds(lambda: layer(rows), device) for _ in range(5))
    return 2 * WIDTH * WIDTH * ROWS / spent


@dataclass(frozen=True, slots=True)
class Probes:
    """What the machine did at the moments when it was probed. Units: B/s, operations/s."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    bandwidths: list[float] = field(default_factory=list)
    operations: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Probe both, now; nothing else should compute meanwhile."""
        self.bandwidths.append(bandwidth(self.device, self.threads))
        self.operations.append(multiplying(self.device, self.dtype))

    def roofline(self, config: ModelConfig, context_len: int) -> Roofline:
        """By the best moment of each."""
        return Roofline(
            config=config,
            dtype=self.dtype,
            kept=kept_in(DTYPES[config.dtype], self.dtype, self.device),
            bandwidth=max(self.bandwidths),
            operations=max(self.operations),
            context_len=context_len,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What bounds a decode step of one model on one machine. Units: B/s, operations/s; tokens of each context."""

    config: ModelConfig
    dtype: torch.dtype
    kept: torch.dtype
    bandwidth: float
    operations: float
    context_len: int

    def step_s(self, batch_size: int) -> float:
        """No decode step of so many sequences takes less."""
        num_bytes = gpu_speed.token_bytes(self.config, self.dtype, self.context_len, batch_size, kept=self.kept)
        weights = gpu_speed.token_bytes(self.config, self.dtype, 0) / self.dtype.itemsize
        return max(num_bytes / self.bandwidth, 2 * weights * batch_size / self.operations)

    def points(self, most: int) -> list[tuple[float, float]]:
        """Seconds a token and tokens a second, for each power of two of sequences up to the first beyond `most`."""
        sizes = [1]
        while sizes[-1] <= most:
            sizes.append(2 * sizes[-1])
        return [(self.step_s(n), n / self.step_s(n)) for n in sizes]
