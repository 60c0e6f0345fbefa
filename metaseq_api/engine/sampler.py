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
from metaseq_api.engine.penalties import Adjustment, adjust
from metaseq_api.model.paths import Pick
from metaseq_api.parallel.transfer import put

CANDIDATES = (64, 1024)
"""How many of the likeliest tokens top_p looks at first; all of them where these do not hold enough."""
GREEDY = -1.0
"""In place of a row's uniform number: its likeliest token."""
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
    overwrite the logits it samples from: 32 rows of 50272 are 6 MB to copy. `pick`: how a row is chosen from of which
    nothing is cut, where there is a better way than torch's."""

    def __init__(self, *, num_tokens: int, banned: Seq[int], spends: bool = False, pick: Pick | None = None) -> None:
        self._num_tokens, self._spends, self._pick = num_tokens, spends, pick or _pick
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
        cut = [i for i, r in enumerate(rows) if not r.params.greedy and _is_cut(r)]
        drawn = [GREEDY if r.params.greedy else r.uniform for r in rows]
        for i in cut:
            drawn[i] = GREEDY
        best_R, chosen_R = self._pick(scores_RV, drawn)
        if cut:
            at = put(cut, device, torch.long)
            chosen_R.index_copy_(0, at, _draw(_rows(scores_RV, at), [rows[i] for i in cut]))
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


def _is_cut(row: Row) -> bool:
    """Whether some tokens are out of the question for it."""
    return row.top_p < 1 or row.params.top_k is not None or row.params.min_p > 0


def _pick(scores_RV: Tensor, uniforms: Seq[float]) -> tuple[Tensor, Tensor]:
    """As `model.paths.Pick` says, by torch's operations."""
    best_R, chosen_R = scores_RV.max(-1)
    if drawn := [i for i, uniform in enumerate(uniforms) if uniform != GREEDY]:
        at = put(drawn, scores_RV.device, torch.long)
        probs_RV = _rows(scores_RV, at).softmax(-1)
        chosen_R.index_copy_(0, at, _invert(probs_RV, [uniforms[i] for i in drawn]))
    return best_R, chosen_R


def _draw(scores_RV: Tensor, rows: Seq[Row]) -> Tensor:
    """One token a row: all that min_p leaves are open where neither top_p nor top_k is set, else a sorted few.
    Overwrites."""
    num, device = scores_RV.shape[1], scores_RV.device
    if lean := [i for i, r in enumerate(rows) if r.params.min_p > 0]:
        at = put(lean, device, torch.long)
        lean_RV = scores_RV.index_select(0, at)
        below = put([math.log(max(rows[i].params.min_p, LEAST)) for i in lean], device, torch.float32)
        least_R1 = lean_RV.max(-1, keepdim=True).values + below[:, None]
        scores_RV.index_copy_(0, at, lean_RV.where(lean_RV >= least_R1, -torch.inf))
    chosen = torch.zeros(len(rows), dtype=torch.long, device=device)
    probs_RV = scores_RV.softmax(-1)
    cut = [i for i, r in enumerate(rows) if r.top_p < 1 or r.params.top_k is not None]
    free = sorted(set(range(len(rows))) - set(cut))
    if free:
        at = put(free, device, torch.long)
        chosen.index_copy_(0, at, _invert(_rows(probs_RV, at), [rows[i].uniform for i in free]))
    for size in (*(s for s in CANDIDATES if s < num), num):
        if not cut:
            break
        at = put(cut, device, torch.long)
        kept, ids, enough = _nucleus(_rows(probs_RV, at), [rows[i] for i in cut], size)
        drawn = ids.gather(1, _invert(kept, [rows[i].uniform for i in cut])[:, None])[:, 0]
        chosen.index_copy_(0, at, drawn)  # of a row without enough, a later turn writes it again
        cut = [i for i, ok in zip(cut, enough, strict=True) if not ok]
    return chosen


def _rows(x_RV: Tensor, at: Tensor) -> Tensor:
    return x_RV if len(at) == len(x_RV) else x_RV.index_select(0, at)


def _nucleus(probs_RV: Tensor, rows: Seq[Row], size: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The likeliest `size` tokens of each row: their weights (0 where top_k or top_p cut), their ids, and whether
    what is cut holds no more of them. Waits for the GPU unless `size` is all. Shapes: -> [R, size], [R, size], R."""
    num, device = probs_RV.shape[1], probs_RV.device
    # a top_p of 1 keeps what rounding would put beyond it
    top_p = [max(r.top_p, LEAST) if r.top_p < 1 else 2.0 for r in rows]
    top_p_R1 = put(top_p, device, torch.float32)[:, None]
    top_k = [min(r.params.top_k or num, num) for r in rows]
    values, ids = probs_RV.topk(size)
    if min(top_k) < num:
        top_k_R1 = put(top_k, device, torch.long)[:, None]
        values = values.where(torch.arange(size, device=device) < top_k_R1, 0)
        top_p_R1 = torch.where(top_k_R1 < num, top_p_R1 * values.sum(-1, keepdim=True), top_p_R1)
    before = values.cumsum(-1) - values
    # metaseq's rule: a token stays while the mass before it is less than top_p, so the first always does
    kept = values.where(before < top_p_R1, 0)
    if size == num:
        return kept, ids, [True] * len(rows)
    ended = (kept[:, -1] == 0).tolist()
    return kept, ids, [e and (k == num or k <= size) for e, k in zip(ended, top_k, strict=True)]


def _invert(weights_RV: Tensor, uniforms: Seq[float]) -> Tensor:
    """Where each uniform number falls in the row's cumulated weights. Shapes: -> [R]."""
    cumulated = weights_RV.cumsum(-1, dtype=torch.float64)
    target = put(uniforms, weights_RV.device, torch.float64)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=weights_RV.shape[1] - 1)
