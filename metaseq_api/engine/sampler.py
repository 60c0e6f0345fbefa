"""From logits to tokens, each row by its own parameters. Knows distributions; not sequences, text or other ranks.

A row's draw depends on its logits, its parameters and one uniform number given for it, and on nothing else in the
batch. Log-probabilities are the model's own, after temperature (as metaseq's are) and before any token is forbidden.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from metaseq_api.core import SamplingParams

CANDIDATES = (64, 1024)
"""How many of the likeliest tokens top_p looks at first; all of them where these do not hold enough."""
COLDEST, LEAST = 1e-6, 1e-30
"""Temperatures and top_p below these choose no differently, but leave what fp32 can tell from zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row to sample: its parameters, a number in [0, 1), and whether </s> may be chosen."""

    params: SamplingParams
    uniform: float
    allow_eos: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A token with its log-probability (None where nobody asked), and the likeliest tokens with theirs."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Forbids `banned` ids (padding) and all from `num_tokens` on (rows that pad the vocabulary)."""

    def __init__(self, *, num_tokens: int, eos_id: int, banned: Seq[int]) -> None:
        self._num_tokens = num_tokens
        self._eos_id = eos_id
        self._banned = list(banned)

    def sample(self, logits_RV: Tensor, rows: Seq[Row]) -> list[Scored | None]:
        """Choose a token for each row; None for a row whose logits are not numbers."""
        raw_RV = _tempered(logits_RV, [r.params for r in rows])
        scores_RV = raw_RV[:, : self._num_tokens].clone()
        scores_RV[:, self._banned] = -torch.inf
        if ended := [i for i, r in enumerate(rows) if not r.allow_eos]:
            scores_RV[ended, self._eos_id] = -torch.inf
        best_R, chosen_R = scores_RV.max(-1)
        if drawn := [i for i, r in enumerate(rows) if not r.params.greedy]:
            chosen_R[drawn] = _draw(scores_RV[drawn], [rows[i] for i in drawn])
        tokens = chosen_R.tolist()
        sound = best_R.isfinite().tolist()  # max passes NaN on, and -inf means that nothing was left to choose
        scored = self._score(raw_RV, tokens, [r.params for r in rows])
        return [s if ok else None for s, ok in zip(scored, sound, strict=True)]

    def score(self, logits_RV: Tensor, tokens: Seq[int], params: SamplingParams) -> list[Scored]:
        """Log-probabilities of given tokens, one a row (a prompt's)."""
        every = [params] * len(tokens)
        return self._score(_tempered(logits_RV, every), tokens, every)

    def _score(self, raw_RV: Tensor, tokens: Seq[int], params: Seq[SamplingParams]) -> list[Scored]:
        scored = [Scored(token_id=t, logprob=None) for t in tokens]
        wanted = [i for i, p in enumerate(params) if p.logprobs is not None or p.num_samples > p.n]
        if not wanted:
            return scored
        logprobs = raw_RV[wanted].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=raw_RV.device))[:, 0].tolist()
        most = max(params[i].logprobs or 0 for i in wanted)
        top_values, top_ids = logprobs.topk(min(most, logprobs.shape[1])) if most else (None, None)
        for at, i in enumerate(wanted):
            top: tuple[tuple[int, float], ...] = ()
            if top_ids is not None and top_values is not None and (k := params[i].logprobs):
                top = tuple(zip(top_ids[at, :k].tolist(), top_values[at, :k].tolist(), strict=True))
            scored[i] = Scored(token_id=tokens[i], logprob=own[at], top=top)
        return scored


def _tempered(logits_RV: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Logits over temperature; a greedy row's as they are."""
    if all(p.greedy or p.temperature == 1 for p in params):
        return logits_RV
    heat = [1.0 if p.greedy else max(p.temperature, COLDEST) for p in params]
    return logits_RV / torch.tensor(heat, device=logits_RV.device)[:, None]


def _draw(scores_RV: Tensor, rows: Seq[Row]) -> Tensor:
    """One token a row: all tokens are open where neither top_p nor top_k is set, else a sorted few."""
    chosen = torch.zeros(len(rows), dtype=torch.long, device=scores_RV.device)
    probs_RV = scores_RV.softmax(-1)
    cut = [i for i, r in enumerate(rows) if r.params.top_p < 1 or r.params.top_k is not None]
    free = sorted(set(range(len(rows))) - set(cut))
    if free:
        chosen[free] = _invert(probs_RV[free], [rows[i].uniform for i in free])
    sizes = [s for s in CANDIDATES if s < probs_RV.shape[1]] + [probs_RV.shape[1]]
    for size in sizes:
        if not cut:
            break
        top_p = torch.tensor([max(rows[i].params.top_p, LEAST) for i in cut], device=probs_RV.device)[:, None]
        top_k = torch.tensor([rows[i].params.top_k or size + 1 for i in cut], device=probs_RV.device)[:, None]
        values, ids = probs_RV[cut].topk(size)
        before = values.cumsum(-1) - values
        # metaseq's rule: a token stays while the mass before it is less than top_p, so the first always does
        kept = values.where((before < top_p) & (torch.arange(size, device=values.device) < top_k), 0)
        enough = ((kept[:, -1:] == 0) | (size == probs_RV.shape[1]))[:, 0].tolist()
        drawn = ids.gather(1, _invert(kept, [rows[i].uniform for i in cut])[:, None])[:, 0]
        done = [at for at, ok in enumerate(enough) if ok]
        chosen[[cut[at] for at in done]] = drawn[done]
        cut = [i for i, ok in zip(cut, enough, strict=True) if not ok]
    return chosen


def _invert(weights_RV: Tensor, uniforms: Seq[float]) -> Tensor:
    """Where each uniform number falls in the row's cumulated weights. Shapes: -> [R]."""
    cumulated = weights_RV.cumsum(-1, dtype=torch.float64)
    target = torch.tensor(uniforms, dtype=torch.float64, device=weights_RV.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=weights_RV.shape[1] - 1)
