"""Where this process stands among the ranks, and the groups it talks over. An argument everywhere, never a global.

Knows torch.distributed. Does not know models, or how the processes were started (that is `launch`).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from metaseq_api.parallel.shared import SharedMemory, share

PATIENCE = datetime.timedelta(minutes=10)
"""How long a rank waits for the others to start; nodes of one job may come minutes apart."""
LOOK = datetime.timedelta(seconds=1)
"""How often a rank that waits for others looks whether they live."""


def _trust() -> None:
    """The others live: whoever started them ends this rank too if one does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """One rank along the tensor axis. `group` (NCCL or gloo) or `memory` carries tensors, `control` (gloo) orders."""

    rank: int = 0
    tensor_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    control: Any = None
    store: Any = None
    memory: SharedMemory | None = None

    @property
    def is_driver(self) -> bool:
        """Whether this rank schedules, samples and serves."""
        return self.rank == 0

    def span(self, total: int) -> tuple[int, int]:
        """This rank's half-open share of `total` rows or columns, which must divide."""
        each, rest = divmod(total, self.tensor_size)
        assert rest == 0, (total, self.tensor_size)
        return self.rank * each, (self.rank + 1) * each

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place."""
        if self.memory is not None:
            return self.memory.all_reduce(x)
        if self.tensor_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's `x` (one shape) on the driver, in rank order; None elsewhere."""
        if self.tensor_size == 1:
            return [x]
        if self.memory is not None:
            return self.memory.gather(x)
        parts = [torch.empty_like(x) for _ in range(self.tensor_size)] if self.is_driver else None
        dist.gather(x, parts, dst=0, group=self.group)
        return parts

    def spread(self, x: torch.Tensor) -> None:
        """Overwrite every rank's `x` (one shape) with the driver's."""
        if self.tensor_size > 1:
            dist.broadcast(x, src=0, group=self.group)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, on all of them."""
        if self.tensor_size == 1:
            return number
        smallest = torch.tensor([number])
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.control)
        return int(smallest)

    def wait_for_all(self, what: str, *, timeout_s: float, check: Callable[[], None] = _trust) -> None:
        """Return once every rank has come here; unlike a collective, ranks may arrive minutes apart.

        `check` as in `join`. Units: seconds. Raises: torch.distributed.DistStoreError after timeout_s.
        """
        if self.tensor_size > 1:
            _wait(self.store, what, self.rank, self.tensor_size, timeout_s, check)


def join(
    *,
    rank: int,
    world_size: int,
    init: str,
    device: torch.device,
    timeout_s: float,
    node: str | None = None,
    listen_fd: int | None = None,
    check: Callable[[], None] = _trust,
) -> ParallelContext:
    """Meet the other ranks at `init` (file:///path, tcp://host:port or agent://host:port) and form the groups.

    Ranks on a CPU that are all on one `node` sum through memory they share; without it, over sockets. `listen_fd` is a
    listening socket on that port for rank 0, which has it from then on. `check` is called every second while others are
    waited for; what it raises ends the waiting. It is for a rank that nobody would kill if another is lost.
    Units: timeout_s seconds, after which a collective gives a lost rank up.
    """
    if world_size == 1:
        return ParallelContext(device=device)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = _store(init, rank, world_size, listen_fd)
    # gloo's own patience is timeout_s, and ranks may start minutes apart
    _wait(store, "here", rank, world_size, PATIENCE.total_seconds(), check)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return ParallelContext(
        rank=rank,
        tensor_size=world_size,
        device=device,
        group=dist.group.WORLD,
        control=dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD,
        store=store,
        memory=share(store, rank, world_size, node, timeout_s) if node is not None and backend == "gloo" else None,
    )


def _wait(store: Any, what: str, rank: int, world_size: int, timeout_s: float, check: Callable[[], None]) -> None:
    store.set(f"{what}/{rank}", "1")
    keys, deadline = [f"{what}/{r}" for r in range(world_size)], time.monotonic() + timeout_s
    while not store.check(keys):
        check()
        try:
            store.wait(keys, LOOK)
        except RuntimeError:  # not yet; each kind of store has its own class for it
            if time.monotonic() > deadline:
                raise


def leave(context: ParallelContext) -> None:
    """Part from the other ranks."""
    if context.tensor_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def break_off(context: ParallelContext) -> None:
    """Hang up on every rank, so that those that wait for this one notice now and not at their own timeout."""
    if context.memory is not None:
        context.memory.break_off()
    leave(context)


def _store(init: str, rank: int, world_size: int, listen_fd: int | None) -> Any:
    if init.startswith("file://"):
        return dist.FileStore(init[len("file://") :], world_size)  # type: ignore[attr-defined]
    scheme, _, address = init.partition("://")
    host, _, port = address.rpartition(":")
    listens = scheme == "tcp" and rank == 0  # behind agent:// torchrun's own agent listens already
    return dist.TCPStore(  # type: ignore[attr-defined]
        host.strip("[]"), int(port), world_size, is_master=listens, timeout=PATIENCE, master_listen_fd=listen_fd
    )
