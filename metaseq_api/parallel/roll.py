"""Who the ranks are, and which of them are lost: told over the store, which outlives the groups.

When a collective breaks off, every rank that still runs says so in the store; who does not within ROLL_S is lost. Knows
names, nodes and process ids. Does not know why a rank is lost, or what is done about it.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from dataclasses import dataclass

from metaseq_api.parallel.context import ParallelContext

ROLL_S = 2.0
"""Units: seconds in which a rank whose collective broke off says that it, at least, is there."""
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One rank as a person would look for it."""

    rank: int
    node: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.node})"


def sign_in(context: ParallelContext, node: str, pid: int) -> list[Peer]:
    """Tell the others where this rank is; returns all ranks. Every rank must call it."""
    me = Peer(rank=context.rank, node=node, pid=pid)
    if context.tensor_size == 1:
        return [me]
    context.store.set(f"peer/{me.rank}", json.dumps([node, pid]))
    told = [json.loads(context.store.get(f"peer/{r}")) for r in range(context.tensor_size)]
    return [Peer(rank=r, node=str(n), pid=int(p)) for r, (n, p) in enumerate(told)]


def missing(context: ParallelContext, peers: list[Peer]) -> list[Peer]:
    """The ranks that do not answer, after a collective broke off here.

    Where the store itself does not answer, the rank that keeps it is lost: rank 0.
    """
    present: set[int] = set()
    asked = threading.Event()

    def call() -> None:
        try:
            store = context.store
            store.set_timeout(datetime.timedelta(seconds=ROLL_S))
            store.set(f"broke-off/{context.rank}", "1")
            deadline = time.monotonic() + ROLL_S
            while len(present) < len(peers) and time.monotonic() < deadline:
                present.update(p.rank for p in peers if p.rank not in present and store.check([f"broke-off/{p.rank}"]))
                asked.set()
                threading.Event().wait(_PAUSE_S)
        except (RuntimeError, ValueError):  # torch's DistStoreError is the former
            return

    thread = threading.Thread(target=call, name="roll", daemon=True)  # a store whose keeper is held never answers
    thread.start()
    thread.join(ROLL_S + 1)
    if not asked.is_set() and context.rank != 0:
        return peers[:1]
    return [p for p in peers if p.rank not in present and p.rank != context.rank]
