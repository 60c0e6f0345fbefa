"""Sums and gathers among ranks of one machine, through memory they share: over gloo's sockets each takes about a
millisecond, and a step of 12 layers has 25.

Every rank has a count of what it has said, and two slots that it says it in, in turn. Whoever says its n-th thing knows
that all have read its (n-2)nd, for they have said their (n-1)st. A wait looks for a moment, then sleeps in the kernel.
`kernels/cpu/ranks.c` takes part in the same way, with `state`.

Knows memory, processes of this machine and the kernel's futex. Does not know torch.distributed, or what is summed. For
processors that keep the order of writes alone, as x86 does: data is written before its count, with no barrier between.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import os
import platform
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metaseq_api.kernels.structs import Ranks

log = logging.getLogger(__name__)

SLOT = 1 << 20
"""Units: bytes said at once; larger tensors take several turns."""
LOOK_S = 0.1
"""Units: seconds after which a rank that waits looks whether the other lives."""
SPINS, LOOKS = 2000, 5000
"""Looks before it sleeps, where every rank has a core; and a kernel's, which are shorter."""
_TOKEN = 16
_LINE = 64
_HEAD = 4096
_COUNT, _GONE = 0, 1  # words of a rank's line
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 202, 0, 1, 1 << 30


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.POINTER(_Timespec),
    ctypes.c_void_p,
    ctypes.c_uint32,
]
_LOOK = _Timespec(0, int(LOOK_S * 1e9))


class SharedMemory:
    """One rank's view. Tensors are contiguous and on the CPU; every rank must call the same methods in the same order.

    Every method raises RuntimeError where another rank is lost, or says nothing for `timeout_s` seconds.
    """

    def __init__(self, fd: int, rank: int, pids: list[int], timeout_s: float) -> None:
        self._rank, self._pids, self._timeout_s = rank, pids, timeout_s
        self._others = [r for r in range(len(pids)) if r != rank]
        self._spins = SPINS if len(os.sched_getaffinity(0)) >= len(pids) else 0
        memory = mmap.mmap(fd, size_of(len(pids)))
        self._words = memoryview(memory)[_TOKEN : _TOKEN + len(pids) * _LINE].cast("Q")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._address = whole.data_ptr() + _TOKEN
        self._bytes = whole[_HEAD:].view(len(pids), 2, SLOT)
        self._slots: dict[torch.dtype, list[list[torch.Tensor]]] = {}
        looks = LOOKS if self._spins else 0
        slots = whole.data_ptr() + _HEAD
        self.state = Ranks(self._address, slots, 0, SLOT, rank, len(pids), looks)
        """What this rank has said and where, for kernels too."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place, with one rounding: the same bits on all."""
        for piece in _pieces(x):
            self._say(piece)
            self.hear_sum(piece)
        return x

    def hear_sum(self, x: torch.Tensor) -> None:
        """The second half of a sum, of which this rank's part is said."""
        self.hear()
        x = x.view(-1)
        parts = self._parts(x)
        if len(parts) == 2:
            torch.add(parts[0], parts[1], out=x)
        else:
            total = parts[0].to(torch.float32, copy=True)
            for part in parts[1:]:
                total += part
            x.copy_(total)

    def hear(self) -> None:
        """Wait until every rank has said as much as this one."""
        words, count = self._words, self.state.count
        for rank in self._others:
            at = rank * _LINE // 8 + _COUNT
            for _ in range(self._spins):
                if words[at] >= count:
                    break
            else:
                self._sleep(rank, count)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it is said in one turn: only then can a kernel sum it."""
        return x.nbytes <= SLOT

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's `x` (one shape) on rank 0, in rank order; None elsewhere."""
        found = [torch.empty_like(x) for _ in self._pids] if self._rank == 0 else None
        whole = [] if found is None else [_pieces(f) for f in found]
        for i, piece in enumerate(_pieces(x)):
            self._say(piece)
            if found is not None:
                self.hear()
                for pieces, part in zip(whole, self._parts(piece), strict=True):
                    pieces[i].copy_(part)
        return found

    def break_off(self) -> None:
        """Have the others find, now, that this rank takes part no more."""
        self._words[self._rank * _LINE // 8 + _GONE] = 1
        self._wake()

    def _say(self, piece: torch.Tensor) -> None:
        self.hear()  # the last one, and so that the one before was read
        self.state.count += 1
        self._parts(piece)[self._rank].copy_(piece)
        self._words[self._rank * _LINE // 8 + _COUNT] = self.state.count
        self._wake()

    def _parts(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """Where every rank's piece is, once it is heard."""
        slots = self._slots.get(piece.dtype)
        if slots is None:
            slots = self._slots[piece.dtype] = [list(b.view(piece.dtype)) for b in self._bytes.unbind(1)]
        num = piece.numel()
        return [slot[:num] for slot in slots[self.state.count % 2]]

    def _sleep(self, rank: int, count: int) -> None:
        at, began = rank * _LINE // 8 + _COUNT, time.monotonic()
        look = began + LOOK_S
        while (heard := self._words[at]) < count:
            if self._words[at + _GONE]:
                raise RuntimeError(f"the connection to its peer, rank {rank}, was broken off there")
            _syscall(_SYS_FUTEX, self._address + at * 8, _FUTEX_WAIT, heard & 0xFFFFFFFF, _LOOK, None, 0)
            now = time.monotonic()
            if now < look:
                continue
            look = now + LOOK_S
            if _is_gone(self._pids[rank]) and self._words[at] < count:
                raise RuntimeError(f"the process of its peer, rank {rank}, is gone")
            if now - began > self._timeout_s:
                raise RuntimeError(f"timed out after {self._timeout_s:g} s of waiting for rank {rank}")

    def _wake(self) -> None:
        _syscall(_SYS_FUTEX, self._address + self._rank * _LINE, _FUTEX_WAKE, _EVERYBODY, None, None, 0)


def _pieces(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """What is said in one turn each."""
    flat, most = x.view(-1), SLOT // x.itemsize
    return torch.split(flat, most) if flat.numel() > most else (flat,)


def size_of(num_ranks: int) -> int:
    """Units: bytes."""
    assert _TOKEN + num_ranks * _LINE <= _HEAD
    return _HEAD + num_ranks * 2 * SLOT


def share(store: Any, rank: int, num_ranks: int, node: str, timeout_s: float) -> SharedMemory | None:
    """Memory shared by all ranks; None, on every rank, where they are not all on `node` or one cannot have it.

    Every rank must call it; the others are told by a `store` of torch.distributed's.
    """
    place = [node, platform.machine(), _boot(), _namespace()]
    told = _tell(store, "place", rank, num_ranks, place)
    most = (_HEAD - _TOKEN) // _LINE
    if any(t != place for t in told) or platform.machine() != "x86_64" or num_ranks > most:
        return None
    with contextlib.ExitStack() as files:
        if rank == 0:
            store.set("shared/where", json.dumps(_make(files, num_ranks)))
        where = json.loads(store.get("shared/where"))
        fd = _open(files, where) if where else None
        pids = _tell(store, "pid", rank, num_ranks, os.getpid() if fd is not None else None)
        if fd is None or None in pids:
            log.warning("the ranks cannot share memory, and sum over sockets, which is slower")
            return None
        return SharedMemory(fd, rank, pids, timeout_s)


def _tell(store: Any, what: str, rank: int, num_ranks: int, mine: Any) -> list[Any]:
    """What every rank says, in order."""
    store.set(f"shared/{what}/{rank}", json.dumps(mine))
    return [json.loads(store.get(f"shared/{what}/{r}")) for r in range(num_ranks)]


def _make(files: contextlib.ExitStack, num_ranks: int) -> list[Any] | None:
    """A file without a name that others of this machine find: its place, and what it begins with; None without one."""
    try:
        fd = os.memfd_create("metaseq-api")
        files.callback(os.close, fd)
        os.posix_fallocate(fd, 0, size_of(num_ranks))
    except OSError as e:
        log.info("no memory to share: %s", e.strerror)
        return None
    token = secrets.token_bytes(_TOKEN)
    os.pwrite(fd, token, 0)
    return [f"/proc/{os.getpid()}/fd/{fd}", token.hex()]


def _open(files: contextlib.ExitStack, where: list[Any]) -> int | None:
    try:
        fd = os.open(where[0], os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        log.info("the memory that rank 0 shares is out of reach: %s", e.strerror)
        return None
    files.callback(os.close, fd)
    return fd if os.pread(fd, _TOKEN, 0).hex() == where[1] else None


def _is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _boot() -> str:
    """This machine, until it starts again."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    """Among whose processes this one counts."""
    return os.readlink("/proc/self/ns/pid")
