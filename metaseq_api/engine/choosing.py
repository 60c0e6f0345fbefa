"""What is asked of rows of scores: one token of each, and log-probabilities. By torch's operations, on whatever device
they are; a CPU may have kernels for it (`kernels.native`), which do the same.

Each token weighs exp(score). The order: min_p, top_k, top_p, each on what the one before left. Knows scores and what is
to be left of them. Does not know whose they are, or what came into them (`sampler`).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metaseq_api.parallel.transfer import put

CANDIDATES = (64, 1024)
"""How many of the likeliest tokens top_p looks at first; all of them where these do not hold enough."""


class Choice(NamedTuple):
    """The token that `uniform`, in [0, 1), falls on; less than 0: the likeliest, whatever else is said.

    below: how far below the best one a score may be (min_p's logarithm). top_k: 0 for all. Of equal ones the first stay
    (here, with top_k or top_p, any). forbidden: tokens that are not among them.
    """

    uniform: float
    top_p: float = 1.0
    top_k: int = 0
    below: float = -math.inf
    forbidden: tuple[int, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether some tokens are out of the question."""
        return self.top_p < 1 or self.top_k > 0


LIKELIEST = Choice(-1.0)


class Chooser(Protocol):
    """Somebody who answers."""

    def draw(self, scores_RV: Tensor, choices: Seq[Choice], banned: Seq[int] = ()) -> Tensor:
        """Of each row the token chosen, no banned one, and the highest score that one may have: NaN where there is one,
        -inf where no token was left. Overwrites scores. Shapes: [R, V], R -> [R, 2] in fp64.
        """
        ...

    def rate(self, scores_RV: Tensor, rows: Seq[int], chosen_R: Tensor, most: int) -> Tensor:
        """Of each of some rows, in their order: its chosen token's log-probability and rank, 1 for the likeliest; then
        the log-probabilities of the `most` likeliest; then these. 53 bits hold an id and an fp32 number alike.

        Shapes: [R, V], N, [R] -> [N, 2 + 2 most] in fp64.
        """
        ...


class ByTorch:
    """Implements Chooser."""

    def draw(self, scores_RV: Tensor, choices: Seq[Choice], banned: Seq[int] = ()) -> Tensor:
        for token_id in banned:
            scores_RV[:, token_id] = -torch.inf
        if forbidden := [(i, t) for i, choice in enumerate(choices) for t in choice.forbidden]:
            at_2N = put([*zip(*forbidden, strict=True)], scores_RV.device, torch.long)
            scores_RV.index_put_((at_2N[0], at_2N[1]), scores_RV.new_full((), -torch.inf))
        best_R, chosen_R = scores_RV.max(-1)
        if drawn := [i for i, choice in enumerate(choices) if choice.uniform >= 0]:
            at = put(drawn, scores_RV.device, torch.long)
            chosen_R.index_copy_(0, at, _draw(_rows(scores_RV, at), [choices[i] for i in drawn]))
        return torch.stack([chosen_R.double(), best_R.double()], 1)

    def rate(self, scores_RV: Tensor, rows: Seq[int], chosen_R: Tensor, most: int) -> Tensor:
        at = put(list(rows), scores_RV.device, torch.long)
        logprobs = _rows(scores_RV, at).log_softmax(-1)
        own_N1 = logprobs.gather(1, chosen_R.index_select(0, at)[:, None])
        above_N1 = (logprobs > own_N1).sum(-1, keepdim=True)
        tops = logprobs.topk(most) if most else ()
        return torch.cat([x.double() for x in (own_N1, above_N1 + 1, *tops)], 1)


def _draw(scores_RV: Tensor, rows: Seq[Choice]) -> Tensor:
    """One token a row: all that min_p leaves are open where neither top_p nor top_k is set, else a sorted few.
    Overwrites."""
    num, device = scores_RV.shape[1], scores_RV.device
    if lean := [i for i, r in enumerate(rows) if r.below > -math.inf]:
        at = put(lean, device, torch.long)
        lean_RV = scores_RV.index_select(0, at)
        below = put([rows[i].below for i in lean], device, torch.float32)
        least_R1 = lean_RV.max(-1, keepdim=True).values + below[:, None]
        scores_RV.index_copy_(0, at, lean_RV.where(lean_RV >= least_R1, -torch.inf))
    chosen = torch.zeros(len(rows), dtype=torch.long, device=device)
    probs_RV = scores_RV.softmax(-1)
    cut = [i for i, r in enumerate(rows) if r.is_cut]
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


def _nucleus(probs_RV: Tensor, rows: Seq[Choice], size: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The likeliest `size` tokens of each row: their weights (0 where top_k or top_p cut), their ids, and whether
    what is cut holds no more of them. Waits for the GPU unless `size` is all. Shapes: -> [R, size], [R, size], R."""
    num, device = probs_RV.shape[1], probs_RV.device
    # a top_p of 1 keeps what rounding would put beyond it
    top_p = [r.top_p if r.top_p < 1 else 2.0 for r in rows]
    top_p_R1 = put(top_p, device, torch.float32)[:, None]
    top_k = [min(r.top_k or num, num) for r in rows]
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
