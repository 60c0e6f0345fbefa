"""Who comes next when several tenants wait: each gets tokens in proportion to its weight, however much it asks.

Each tenant has a counter of the tokens it was served, divided by its weight; of those that wait, the one whose counter
is lowest comes next. One that was away begins no lower than the counter of whoever had the last turn, so that nobody
saves up credit by staying away (more than one turn's), and nobody who comes new waits for the others' past. The lowest
counter of all who wait would be the wrong place to begin: a tenant that sends one request after another would be raised
to the others' level before each, and its weight would count for nothing. Within a tenant the lowest `priority` comes
first, of equals the one that came first. push, pop, remove and charge take O(log n).

Source: Goyal et al., Start-time Fair Queueing (1996), section 2, for where one begins; Sheng et al., Fairness in
Serving Large Language Models (2024), section 4, for counting tokens as they are served.
Knows tenants, weights and costs. Does not know sequences, blocks, or what a cost is made of.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    priority: int
    order: int
    item: T
    tenant: _Tenant[T]
    waits: bool = True

    def __lt__(self, other: _Entry[T]) -> bool:
        return (self.priority, self.order) < (other.priority, other.order)


@dataclass(slots=True, eq=False)
class _Tenant(Generic[T]):
    """Kept while idle too: what it was served beyond the others is remembered. There are as many as there are keys."""

    order: int
    weight: float
    served: float
    """Units: tokens divided by weight."""
    heap: list[_Entry[T]] = field(default_factory=list)
    num_waiting: int = 0
    listed: bool = False
    """Whether the heap of tenants has its entry."""


class FairQueue(Generic[T]):
    """Items that wait, by tenant. Items are told apart by identity or hash, and each waits once."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        self._entries: dict[T, _Entry[T]] = {}
        # each listed tenant once, under what it had been served at some time: never more than now
        self._order: list[tuple[float, int, _Tenant[T]]] = []
        self._numbers = itertools.count()
        self._now = 0.0
        """The virtual time: the counter of the tenant that had the last turn, when it had it. It never falls."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def push(self, item: T, *, tenant: str = "", weight: float = 1.0, priority: int = 0) -> None:
        """Let an item wait. The latest weight of a tenant counts for all it does from now on."""
        assert item not in self._entries, "an item waits once"
        assert weight > 0
        owner = self._tenants.get(tenant)
        if owner is None:
            owner = self._tenants[tenant] = _Tenant(next(self._numbers), weight, 0.0)
        owner.weight = weight
        if not owner.num_waiting:
            owner.served = max(owner.served, self._now)
        entry = self._entries[item] = _Entry(priority, next(self._numbers), item, owner)
        heapq.heappush(owner.heap, entry)
        owner.num_waiting += 1
        if not owner.listed:
            owner.listed = True
            heapq.heappush(self._order, (owner.served, owner.order, owner))

    def peek(self) -> T | None:
        """The item whose turn it is; it goes on waiting."""
        owner = self._lowest()
        if owner is None:
            return None
        while not owner.heap[0].waits:
            heapq.heappop(owner.heap)
        return owner.heap[0].item

    def pop(self) -> T | None:
        """Take the item whose turn it is. Whoever takes it charges its tenant for what it is then served."""
        item = self.peek()
        if item is not None:
            self._now = self._entries[item].tenant.served
            self.remove(item)
        return item

    def remove(self, item: T) -> bool:
        """Take an item out wherever it stands; whether it waited."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        entry.waits = False
        owner = entry.tenant
        owner.num_waiting -= 1
        if (
            not owner.num_waiting or len(owner.heap) > 2 * owner.num_waiting + 16
        ):  # mostly entries taken out: forget them
            owner.heap = [e for e in owner.heap if e.waits]
            heapq.heapify(owner.heap)
        return True

    def charge(self, tenant: str, cost: float) -> None:
        """Count what a tenant was served: prompt tokens that were fed, tokens it was given. Units: tokens."""
        assert cost >= 0
        if owner := self._tenants.get(tenant):
            owner.served += cost / owner.weight

    def _lowest(self) -> _Tenant[T] | None:
        """Of the tenants that wait, the one that was served least."""
        while self._order:
            key, order, owner = self._order[0]
            if not owner.num_waiting:
                heapq.heappop(self._order)
                owner.listed = False
            elif key < owner.served:  # charged since
                heapq.heapreplace(self._order, (owner.served, order, owner))
            else:
                return owner
        return None
