"""From logits to tokens, each row by its own parameters. Knows distributions; not sequences, text or other ranks.

A row's draw depends on its logits, its parameters, the counts of its own tokens and one uniform number given for it,
and on nothing else in the batch. The order: logit_bias and the penalties (`penalties`), forbidden tokens, temperature,
min_p, top_k, top_p, each on what the one before left. Log-probabilities are the model's own, after temperature (as
metaseq's are) and before anything else of that.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaseq_api.core import SamplingParams
from metaseq_api.engine.choosing import LIKELIEST, Choice, Pick, choose
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
    """Tokens on their device, [R]; `read` waits for them, and None is a row whose logits are not numbers."""

    chosen_R: Tensor
    read: Callable[[], list[Scored | None]]


class Sampler:
    """Forbids `banned` ids (padding) and all from `num_tokens` on (rows that pad the vocabulary). One that `spends` may
    overwrite the logits it samples from: 32 rows of 50272 are 6 MB to copy. `pick`: how tokens are chosen, where there
    is a better way than torch's."""

    def __init__(self, *, num_tokens: int, banned: Seq[int], spends: bool = False, pick: Pick | None = None) -> None:
        self._num_tokens, self._spends, self._pick = num_tokens, spends, pick or choose
        self._banned = list(banned)

    def sample(self, logits_RV: Tensor, rows: Seq[Row]) -> list[Scored | None]:
        """Choose a token for each row; None for a row whose logits are not numbers."""
        return self.draw(logits_RV, rows).read()

    def draw(self, logits_RV: Tensor, rows: Seq[Row]) -> Drawn:
        """The same, without waiting for a GPU (but where top_p cuts)."""
        device, heat = logits_RV.device, [_heat(r.params) for r in rows]
        raw_RV = _tempered(logits_RV, heat)
        scores_RV, asked = raw_RV[:, : self._num_tokens], [_num_asked(r.params) for r in rows]
        adjusted = [(i, r.adjustment, heat[i]) for i, r in enumerate(rows) if r.adjustment is not None]
        if not self._spends or adjusted or any(k is not None for k in asked):  # else nobody looks at the raw ones again
            scores_RV = scores_RV.clone(memory_format=torch.contiguous_format)
        if adjusted:
            adjust(scores_RV, adjusted)
        for token_id in self._banned:
            scores_RV[:, token_id] = -torch.inf
        if forbidden := [(i, t) for i, r in enumerate(rows) for t in r.forbidden]:
            at_2N = put([*zip(*forbidden, strict=True)], device, torch.long)
            scores_RV.index_put_((at_2N[0], at_2N[1]), scores_RV.new_full((), -torch.inf))
        best_R, chosen_R = self._pick(scores_RV, [_choice(r) for r in rows])
        # the best passes NaN on, and -inf means that nothing was left to choose
        table = _table(raw_RV, chosen_R, asked, beside_R=best_R.isfinite())

        def read() -> list[Scored | None]:
            scored, sound = _read(table, asked)
            return [s if ok else None for s, ok in zip(scored, sound, strict=True)]

        return Drawn(chosen_R=chosen_R, read=read)

    def score(self, logits_RV: Tensor, tokens: Seq[int], params: SamplingParams) -> list[Scored]:
        """Log-probabilities of given tokens, one a row (a prompt's)."""
        raw_RV = _tempered(logits_RV, [_heat(params)] * len(tokens))
        most = max(params.logprobs or 0 if params.echo else 0, params.prompt_logprobs or 0)
        chosen_R = put(list(tokens), logits_RV.device, torch.long)
        asked, ranked = [most] * len(tokens), params.prompt_logprobs is not None
        return _read(_table(raw_RV, chosen_R, asked, ranked=ranked), asked, ranked=ranked)[0]


def _choice(row: Row) -> Choice:
    params = row.params
    if params.greedy:
        return LIKELIEST
    top_p = max(row.top_p, LEAST) if row.top_p < 1 else 1.0
    below = math.log(max(params.min_p, LEAST)) if params.min_p else -math.inf
    return Choice(row.uniform, top_p, params.top_k or 0, below)


def _num_asked(params: SamplingParams) -> int | None:
    """How many of the likeliest tokens are wanted beside the chosen one's log-probability; None for not even that."""
    return params.logprobs if params.num_samples == params.n else params.logprobs or 0


def _table(
    raw_RV: Tensor, chosen_R: Tensor, asked: Seq[int | None], *, ranked: bool = False, beside_R: Tensor | None = None
) -> Tensor:
    """The chosen tokens, `beside_R`'s numbers, and what was asked of each: all of it leaves a GPU in one copy.

    Shapes: -> [R, 2], or with what was asked [R, 3 + ranked + 2 K], K being the most alternatives that anybody wants.
    """
    columns = [chosen_R[:, None], chosen_R[:, None] if beside_R is None else beside_R[:, None]]
    if wanted := [i for i, k in enumerate(asked) if k is not None]:
        most, everyone = min(max(asked[i] or 0 for i in wanted), raw_RV.shape[1]), len(wanted) == len(asked)
        at = put(wanted, raw_RV.device, torch.long)
        logprobs = (raw_RV if everyone else raw_RV.index_select(0, at)).log_softmax(-1)
        own_R1 = logprobs.gather(1, (chosen_R if everyone else chosen_R.index_select(0, at))[:, None])
        found = [own_R1, (logprobs > own_R1).sum(-1, keepdim=True) + 1] if ranked else [own_R1]
        found += logprobs.topk(most) if most else ()
        columns += [x if everyone else x.new_zeros(len(asked), x.shape[1]).index_copy_(0, at, x) for x in found]
    return torch.cat([c.double() for c in columns], 1)  # 53 bits hold an id and an fp32 number alike


def _read(table: Tensor, asked: Seq[int | None], *, ranked: bool = False) -> tuple[list[Scored], list[float]]:
    """A `_table`'s rows, and the numbers that lay beside them."""
    rows = table.tolist()
    if table.shape[1] == 2:  # nobody asked for more
        return [Scored(int(token), None) for token, _ in rows], [row[1] for row in rows]
    most, scored = (table.shape[1] - 3 - ranked) // 2, []
    for k, (token, _, *more) in zip(asked, rows, strict=True):
        own, tops = (more[0], more[1 + ranked :]) if k is not None else (None, [])
        ids = map(int, tops[most:])
        scored.append(
            Scored(
                token_id=int(token),
                logprob=own,
                top=tuple(zip(ids, tops[:most], strict=True))[: k or 0],
                rank=int(more[1]) if ranked and k is not None else None,
            )
        )
    return scored, [row[1] for row in rows]


def _heat(params: SamplingParams) -> float:
    """What the logits are divided by; a greedy row's stay as they are."""
    return 1.0 if params.greedy else max(params.temperature, COLDEST)


def _tempered(logits_RV: Tensor, heat: Seq[float]) -> Tensor:
    if all(h == 1 for h in heat):
        return logits_RV
    return logits_RV / put(heat, logits_RV.device, torch.float32)[:, None]
