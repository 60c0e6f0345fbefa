"""The order for one step: what every rank must know to run the model once. Small, and plain integers on the wire.

Does not know sampling: rank 0 samples, the others only compute.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

UNKNOWN = -1
"""A token that has been drawn and not been read yet: the last one of its sequence."""


class BatchItem(NamedTuple):
    """One sequence's share of a step: feed `token_ids` at positions start, start + 1, ...; hand back logits of the
    last `num_logits` of them (0: none, the prefill goes on in a later step).

    The first `num_prompt` of them are the prompt's, the others were generated. A rank computes the two in two ways, and
    a token always in the same one: so its numbers do not depend on when, or how often, that was done.

    A last token below 0 is one that the step before drew and nobody has read yet: -1 - its row there (`engine.worker`).

    `block_ids` are the cache blocks of positions 0 to start + len(token_ids) - 1, in order.
    """

    start: int
    token_ids: Seq[int]
    block_ids: Seq[int]
    num_logits: int
    num_prompt: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens the last fed token may look at, itself included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """All items of a step, decoding ones and prefilling ones alike; not to be changed once `words` was asked for."""

    items: tuple[BatchItem, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(i.token_ids) for i in self.items)

    @cached_property
    def words(self) -> array[int]:
        """As 32-bit integers: per item start, num_logits, num_prompt, the two lengths, then tokens and blocks.

        What other ranks are sent, and what kernels/cpu/plan.c reads.
        """
        out = array("i", [len(self.items)])
        for i in self.items:
            out.extend((i.start, i.num_logits, i.num_prompt, len(i.token_ids), len(i.block_ids)))
            out.extend(i.token_ids)
            out.extend(i.block_ids)
        return out

    @staticmethod
    def unpack(words: Seq[int]) -> Batch:
        """The inverse of `words`."""
        items, at = [], 1
        for _ in range(words[0]):
            start, num_logits, num_prompt, num_tokens, num_blocks = words[at : at + 5]
            mid = at + 5 + num_tokens
            end = mid + num_blocks
            items.append(
                BatchItem(
                    start=start,
                    num_logits=num_logits,
                    num_prompt=num_prompt,
                    token_ids=tuple(words[at + 5 : mid]),
                    block_ids=tuple(words[mid:end]),
                )
            )
            at = end
        return Batch(items=tuple(items))
