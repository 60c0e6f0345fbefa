"""Who comes next when several tenants wait: each gets tokens in proportion to its weight, however much it asks.

Each tenant has a counter of the tokens it was served, divided by its weight; of those that wait, the one whose counter
is lowest comes next. One that was away begins no lower than the counter of whoever had the last turn, so that nobody
saves up credit by staying away (more than one turn's), and nobody who comes new waits for the others' past. The lowest
counter of all who wait would be the wrong place to begin: a tenant that sends one request after another would be raised
to the others' level before each, and its weight would count for nothing. Within a tenant the lowest `priority` comes
first, of equals the one that came first.

Source: Goyal et al., Start-time Fair Queueing (1996), section 2, for where one begins; Sheng et al., Fairness in
Serving Large Language Models (2024), section 4, for counting tokens as they are served.
Knows tenants, weights and costs. Does not know sequences, blocks, or what a cost is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Tenant(Generic[T]):
    """Kept while idle too: what it was served beyond the others is remembered. There are as many as there are keys."""

    weight: float
    served: float
    """Units: tokens divided by weight."""
    waiting: dict[int, dict[T, None]] = field(default_factory=dict)
    """By priority, in order of arrival."""


class FairQueue(Generic[T]):
    """Items that wait, by tenant. Items are told apart by identity or hash, and each waits once."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        self._places: dict[T, tuple[_Tenant[T], int]] = {}
        self._now = 0.0
        """The virtual time: the counter of the tenant that had the last turn, when it had it. It never falls."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: T) -> bool:
        return item in self._places

    def push(self, item: T, *, tenant: str = "", weight: float = 1.0, priority: int = 0) -> None:
        """Let an item wait. The latest weight of a tenant counts for all it does from now on."""
        assert item not in self._places, "an item waits once"
        assert weight > 0
        owner = self._tenants.setdefault(tenant, _Tenant(weight, 0.0))
        owner.weight = weight
        if not owner.waiting:
            owner.served = max(owner.served, self._now)
        owner.waiting.setdefault(priority, {})[item] = None
        self._places[item] = owner, priority

    def turns(self) -> Iterator[Iterable[T]]:
        """The items that wait, whose turn it is first: alike in tenant and priority together, as they came."""
        owners = [owner for owner in self._tenants.values() if owner.waiting]
        for owner in sorted(owners, key=lambda o: o.served) if len(owners) > 1 else owners:
            for priority in sorted(owner.waiting):
                yield owner.waiting[priority]

    def take_turn(self, item: T) -> None:
        """Note that an item has its tenant's turn; whoever gives it charges the tenant for what it is then served."""
        self._now = max(self._now, self._places[item][0].served)

    def remove(self, item: T) -> bool:
        """Take an item out wherever it stands; whether it waited."""
        owner, priority = self._places.pop(item, (None, 0))
        if owner is None:
            return False
        del owner.waiting[priority][item]
        if not owner.waiting[priority]:
            del owner.waiting[priority]
        return True

    def charge(self, tenant: str, cost: float) -> None:
        """Count what a tenant was served: tokens that were fed. Units: tokens."""
        assert cost >= 0
        if owner := self._tenants.get(tenant):
            owner.served += cost / owner.weight
