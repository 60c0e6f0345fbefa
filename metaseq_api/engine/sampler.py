"""From logits to tokens, each row by its own parameters. Knows distributions; not sequences, text or other ranks.

A row's draw depends on its logits, its parameters, the counts of its own tokens and one uniform number given for it,
and on nothing else in the batch. The order: logit_bias and the penalties (`penalties`), forbidden tokens, temperature,
min_p, top_k, top_p, each on what the one before left. Log-probabilities are the model's own, after temperature (as
metaseq's are) and before anything else of that.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaseq_api.core import SamplingParams
from metaseq_api.engine.choosing import LIKELIEST, ByTorch, Choice, Chooser
from metaseq_api.engine.penalties import Adjustment, adjust
from metaseq_api.parallel.transfer import put

COLDEST, LEAST = 1e-6, 1e-30
"""Temperatures and top_p below these choose no differently, but leave what fp32 can tell from zero."""


class Row(NamedTuple):
    """One row to sample: its parameters, a number in [0, 1), the top_p of this step (it may decay), the tokens that may
    not be chosen now, and what is to be added or taken."""

    params: SamplingParams
    uniform: float
    top_p: float
    forbidden: tuple[int, ...] = ()
    adjustment: Adjustment | None = None


class Scored(NamedTuple):
    """A token with its log-probability (None where nobody asked), and the likeliest tokens with theirs.

    rank: 1 for the likeliest; None where nobody asked.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Tokens that may still be on their device."""

    table: Tensor
    """What `Chooser.draw` gives; where more was asked, beside it what `Chooser.rate` does."""
    asked: Seq[int | None]

    @property
    def chosen_R(self) -> Tensor:
        """The tokens, where they are. Shapes: [R]."""
        return self.table[:, 0]

    def read(self) -> list[Scored | None]:
        """Wait for them; None is a row whose logits are not numbers."""
        scored, best = _read(self.table, self.asked)
        # the best passes NaN on, and -inf means that nothing was left to choose
        return [s if math.isfinite(b) else None for s, b in zip(scored, best, strict=True)]


class Sampler:
    """Forbids `banned` ids (padding) and all from `num_tokens` on (rows that pad the vocabulary). One that `spends` may
    overwrite the logits it samples from: 32 rows of 50272 are 6 MB to copy. `by`: whom it asks, where somebody does
    better than torch."""

    def __init__(self, *, num_tokens: int, banned: Seq[int], spends: bool = False, by: Chooser | None = None) -> None:
        self._num_tokens, self._spends, self._by = num_tokens, spends, by or ByTorch()
        self._banned = list(banned)
        self._room: Tensor | None = None  # for a copy: fresh pages take longer than copying

    def sample(self, logits_RV: Tensor, rows: Seq[Row]) -> list[Scored | None]:
        """Choose a token for each row; None for a row whose logits are not numbers."""
        return self.draw(logits_RV, rows).read()

    def draw(self, logits_RV: Tensor, rows: Seq[Row]) -> Drawn:
        """The same, without waiting for a GPU (but where top_p cuts)."""
        heat = [_heat(r.params) for r in rows]
        raw_RV = _tempered(logits_RV, heat, spends=self._spends)
        scores_RV, asked = raw_RV[:, : self._num_tokens], [_num_asked(r.params) for r in rows]
        adjusted = [(i, r.adjustment, heat[i]) for i, r in enumerate(rows) if r.adjustment is not None]
        if not self._spends or adjusted or any(k is not None for k in asked):  # else nobody looks at the raw ones again
            scores_RV = self._copied(scores_RV)
        if adjusted:
            adjust(scores_RV, adjusted)
        drawn_R2 = self._by.draw(scores_RV, [_choice(r, self._num_tokens) for r in rows], self._banned)
        return Drawn(table=self._table(raw_RV, drawn_R2, asked), asked=asked)

    def score(self, logits_RV: Tensor, tokens: Seq[int], params: SamplingParams) -> list[Scored]:
        """Log-probabilities of given tokens, one a row (a prompt's)."""
        raw_RV = _tempered(logits_RV, [_heat(params)] * len(tokens))
        most = max(params.logprobs or 0 if params.echo else 0, params.prompt_logprobs or 0)
        given_R2 = put(list(tokens), logits_RV.device, torch.double)[:, None].expand(-1, 2)
        asked, ranked = [most] * len(tokens), params.prompt_logprobs is not None
        return _read(self._table(raw_RV, given_R2, asked), asked, ranked=ranked)[0]

    def _copied(self, scores_RV: Tensor) -> Tensor:
        room, num = self._room, len(scores_RV)
        if room is None or len(room) < num or room.shape[1:] != scores_RV.shape[1:] or room.device != scores_RV.device:
            room = self._room = torch.empty_like(scores_RV, memory_format=torch.contiguous_format)
        return room[:num].copy_(scores_RV)

    def _table(self, raw_RV: Tensor, drawn_R2: Tensor, asked: Seq[int | None]) -> Tensor:
        """The chosen tokens, numbers beside them, and what was asked of each: all of it leaves a GPU in one copy.

        Shapes: -> [R, 2], or with what was asked [R, 4 + 2 K], K being the most alternatives that anybody wants.
        """
        if not (wanted := [i for i, k in enumerate(asked) if k is not None]):
            return drawn_R2
        most = min(max(asked[i] or 0 for i in wanted), raw_RV.shape[1])
        found = self._by.rate(raw_RV, wanted, drawn_R2[:, 0].long(), most)
        if len(wanted) < len(asked):
            at = put(wanted, raw_RV.device, torch.long)
            found = found.new_zeros(len(asked), found.shape[1]).index_copy_(0, at, found)
        return torch.cat([drawn_R2, found], 1)


def _choice(row: Row, num_tokens: int) -> Choice:
    params = row.params
    if params.greedy:
        return Choice(LIKELIEST.uniform, forbidden=row.forbidden) if row.forbidden else LIKELIEST
    top_p = max(row.top_p, LEAST) if row.top_p < 1 else 1.0
    below = math.log(max(params.min_p, LEAST)) if params.min_p else -math.inf
    return Choice(row.uniform, top_p, min(params.top_k or 0, num_tokens), below, row.forbidden)


def _num_asked(params: SamplingParams) -> int | None:
    """How many of the likeliest tokens are wanted beside the chosen one's log-probability; None for not even that."""
    return params.logprobs if params.num_samples == params.n else params.logprobs or 0


def _read(table: Tensor, asked: Seq[int | None], *, ranked: bool = False) -> tuple[list[Scored], list[float]]:
    """A table's rows, and the numbers that lay beside their tokens."""
    rows = table.tolist()
    if table.shape[1] == 2:  # nobody asked for more
        return [Scored(int(token), None) for token, _ in rows], [row[1] for row in rows]
    most, scored = (table.shape[1] - 4) // 2, []
    for k, (token, _, own, rank, *tops) in zip(asked, rows, strict=True):
        if k is None:
            scored.append(Scored(int(token), None))
            continue
        top = tuple(zip(map(int, tops[most:]), tops[:most], strict=True))[:k]
        scored.append(Scored(int(token), own, top, int(rank) if ranked else None))
    return scored, [row[1] for row in rows]


def _heat(params: SamplingParams) -> float:
    """What the logits are divided by; a greedy row's stay as they are."""
    return 1.0 if params.greedy else max(params.temperature, COLDEST)


def _tempered(logits_RV: Tensor, heat: Seq[float], *, spends: bool = False) -> Tensor:
    if all(h == 1 for h in heat):
        return logits_RV
    by_R1 = put(heat, logits_RV.device, torch.float32)[:, None]
    return logits_RV.div_(by_R1) if spends else logits_RV / by_R1
