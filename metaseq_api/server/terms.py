"""How urgent a request is and how long it may take: `priority` and `timeout_ms` of a body.

Knows these two fields and what follows from a deadline. Does not know whose request it is, or how it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaseq_api.core import Request
from metaseq_api.errors import DeadlineExceeded
from metaseq_api.server import fields

FIELDS = frozenset({"priority", "timeout_ms"})
MAX_PRIORITY = 100
MAX_TIMEOUT_S = 86400.0
"""Units: seconds; less where the service sets REQUEST_TIMEOUT_S."""


def read_priority(body: Mapping[str, Any]) -> int:
    """Lower comes first, as in vLLM; 0 where nothing is said. Raises: RequestError."""
    value = body.get("priority")
    if value is None:
        return 0
    priority = fields.integer("priority", value)
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise fields.wrong("priority", value, f"between {-MAX_PRIORITY} (first) and {MAX_PRIORITY} (last)")
    return priority


def read_timeout_s(body: Mapping[str, Any], most_s: float | None) -> float | None:
    """How long the request may take; None: as long as it does. `most_s` is what the service allows, and its default.

    Units: seconds. Raises: RequestError.
    """
    value = body.get("timeout_ms")
    if value is None:
        return most_s
    most_ms = round(1000 * longest_s(most_s))
    timeout_ms = fields.integer("timeout_ms", value)
    if not 1 <= timeout_ms <= most_ms:
        raise fields.wrong("timeout_ms", value, f"between 1 and {most_ms} milliseconds")
    return timeout_ms / 1000


OVERDUE_S = 0.25
"""Units: seconds. The engine ends a request that is over its time and says what was done; where it is stuck, we do."""


def longest_s(most_s: float | None) -> float:
    """The most that a request may ask for, where the service allows `most_s`. Units: seconds."""
    return MAX_TIMEOUT_S if most_s is None else most_s


def patience_s(request: Request, poll_s: float, now: float) -> float:
    """How long to wait for an answer before looking again: `poll_s`, or what the deadline leaves. Units: seconds."""
    return poll_s if request.deadline_s is None else min(poll_s, max(request.deadline_s + OVERDUE_S - now, 0.0))


def is_overdue(request: Request, now: float) -> bool:
    """Whether the request's time is over, and the engine should have said so."""
    return request.deadline_s is not None and now >= request.deadline_s + OVERDUE_S


def check_deadline(request: Request, now: float) -> None:
    """Raises: DeadlineExceeded where the request's time is over and the engine has not said so."""
    if is_overdue(request, now):
        raise DeadlineExceeded(
            f"the time for this request was over before its {len(request.prompts) * request.params.num_samples} "
            "completion(s) were done, and it was given up; allow more (timeout_ms), or ask for fewer tokens",
            param="timeout_ms",
        )
