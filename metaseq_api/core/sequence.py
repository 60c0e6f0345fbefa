"""One prompt being continued. Mutable, and changed by the Scheduler alone (and, for its text, by the Engine).

Knows its tokens, its blocks and how far the cache holds it. Does not know tensors, text or other sequences' state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from metaseq_api.core.request import SamplingParams


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Token ids so far (`token_ids`, the leading </s> included) and where the cache stands.

    Invariant: the cache holds keys and values of token_ids[:num_cached]; a sequence with
    num_cached == len(token_ids) - 1 has one token to feed and is decoding, one with less is prefilling.
    """

    seq_id: int
    prompt_len: int
    group: int = 0
    """The request it belongs to; requests take turns."""
    tenant: str = ""
    """Whose key it came with; tenants share what is computed by `weight`."""
    weight: float = 1.0
    priority: int = 0
    """Within a tenant the lowest comes first."""
    token_ids: list[int]
    params: SamplingParams
    max_len: int
    """Most tokens it may ever hold: its prompt and max_tokens; the last of them is never fed."""
    leader: Sequence | None = None
    """Whose head this one waits for and then shares: the first sample of its prompt, or another request's."""
    common_len: int | None = None
    """Tokens it has in common with its leader; None: its prompt."""
    scores_prompt: bool = False
    """Whether the logits of its prompt are wanted too (echo with logprobs, first sample)."""
    status: Status = Status.WAITING
    num_cached: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Of its first full blocks, as far as they were asked for: by these the pool finds their content."""
    num_preemptions: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def is_full(self) -> bool:
        """Whether it has all the tokens it may have: it is to be finished, and nothing of it to be computed."""
        return len(self.token_ids) >= self.max_len and self.num_generated > 0

    @property
    def num_uncached(self) -> int:
        """Tokens whose keys and values are still to be computed; at least 1 while it lives, unless it is
        a prompt that is only scored."""
        return len(self.token_ids) - self.num_cached
