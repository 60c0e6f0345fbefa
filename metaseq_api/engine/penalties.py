"""What is added to or taken from the logits of one sequence before a token is chosen: logit_bias and the penalties.

Knows the formulas and how often a sequence holds each token. Does not know how a token is then chosen.
Only the tokens a sequence holds or names are touched, never the whole vocabulary; a sequence that asks for none of it
has no Adjustment.

Shapes: R rows, V vocabulary, N tokens of all rows that are touched.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from metaseq_api.core import SamplingParams
from metaseq_api.parallel.transfer import put_tensor


class Tally:
    """Token ids, each with a number: a count, or a bias. Takes one more token at a constant cost."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        counted = Counter(ids)
        self._at = {token_id: at for at, token_id in enumerate(counted)}
        self._ids, self._values = array("q", counted), array("f", counted.values())

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, token_id: int, value: float = 1.0) -> None:
        at = self._at.setdefault(token_id, len(self._ids))
        if at < len(self._ids):
            self._values[at] += value
        else:
            self._ids.append(token_id)
            self._values.append(value)

    def views(self) -> tuple[Tensor, Tensor]:
        """Ids and values as they lie; let go of them before the next `add`, which may have to move them."""
        return torch.frombuffer(self._ids, dtype=torch.int64), torch.frombuffer(self._values, dtype=torch.float32)


@dataclass(slots=True, eq=False)
class Adjustment:
    """One sequence's biases and penalties, and the counts they rest on; what nobody asked for is empty.

    prompt: what repetition_penalty looks at beside the generated tokens. source: what metaseq's *_src penalties count.
    """

    params: SamplingParams
    bias: Tally
    prompt: Tally
    source: Tally
    generated: Tally

    @classmethod
    def of(cls, params: SamplingParams, prompt_ids: Seq[int], num_tokens: int) -> Adjustment | None:
        """The start, or None where `params` adjust nothing. prompt_ids: with </s> in front, as the model sees them.

        Ids from num_tokens on only pad the model's vocabulary: a prompt may hold them, nothing can choose them.
        """
        p = params
        repeated = p.repetition_penalty != 1
        sourced = bool(p.alpha_presence_src or p.alpha_frequency_src)
        counted = p.presence_penalty or p.frequency_penalty or p.alpha_presence or p.alpha_frequency
        if not (p.logit_bias or repeated or sourced or counted):
            return None
        bias = Tally()
        for token_id, value in p.logit_bias:
            if token_id < num_tokens:
                bias.add(token_id, value)
        real = [t for t in prompt_ids if t < num_tokens]
        source = [t for t in prompt_ids[: p.alpha_src_penalty_end_idx] if t < num_tokens]
        return cls(p, bias, Tally(real if repeated else ()), Tally(source if sourced else ()), Tally())

    def note(self, token_id: int) -> None:
        """One more token was generated."""
        self.generated.add(token_id)


def adjust(scores_RV: Tensor, given: Seq[tuple[int, Adjustment, float]]) -> None:
    """Bias and penalise, in place, the rows that ask for it. given: (row, its Adjustment, the temperature that its
    scores are already divided by).

    As if before the temperature, in this order: logit_bias; repetition_penalty (a logit above 0 is divided by it, one
    below multiplied); presence_penalty and frequency_penalty. After it, as metaseq does: the alpha penalties.
    Source: OpenAI's API reference; arXiv 1909.05858, 4.1; metaseq sequence_generator.py:368-390, 472-534.
    """
    _subtract(scores_RV, [(i, a.bias, -1 / heat, 0.0) for i, a, heat in given])
    repeated = [(i, a, a.params.repetition_penalty) for i, a, _ in given if a.params.repetition_penalty != 1]
    both = [(i, tally, (by,)) for i, a, by in repeated for tally in (a.prompt, a.generated)]
    if (touched := _touched(both, scores_RV)) is not None:
        flat, at_N, _, (by_N,) = touched
        logits_N = flat.gather(0, at_N)
        # a token of prompt and generated text stands here twice, with one and the same result
        flat.scatter_(0, at_N, torch.where(logits_N > 0, logits_N / by_N, logits_N * by_N))
    generated, source = [], []
    for i, a, heat in given:
        p = a.params
        each = p.frequency_penalty / heat + p.alpha_frequency
        generated.append((i, a.generated, each, p.presence_penalty / heat + p.alpha_presence))
        source.append((i, a.source, p.alpha_frequency_src, p.alpha_presence_src))
    _subtract(scores_RV, generated)
    _subtract(scores_RV, source)


def _subtract(scores_RV: Tensor, given: Seq[tuple[int, Tally, float, float]]) -> None:
    """Take value * each + once from every token of a tally. given: (row, tally, each, once)."""
    wanted = [(i, tally, (each, once)) for i, tally, each, once in given if each or once]
    if (touched := _touched(wanted, scores_RV)) is not None:
        flat, at_N, values_N, (each_N, once_N) = touched
        flat.scatter_add_(0, at_N, -(values_N * each_N + once_N))


def _touched(
    given: Seq[tuple[int, Tally, tuple[float, ...]]], scores_RV: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]] | None:
    """The scores as one line, where in it the tallies' tokens stand, the tallies' values, and each row's factors.
    Shapes: -> [R * V], [N], [N], [N] each."""
    given = [g for g in given if len(g[1])]
    if not given:
        return None
    ids, values = zip(*(tally.views() for _, tally, _ in given), strict=True)
    lengths = torch.tensor([len(tally) for _, tally, _ in given])
    rows_N = torch.tensor([i for i, _, _ in given]).repeat_interleave(lengths)
    at_N = torch.cat(ids) + rows_N * scores_RV.shape[1]
    factors = [torch.tensor(column).repeat_interleave(lengths) for column in zip(*(g[2] for g in given), strict=True)]
    device = scores_RV.device
    values_N, *by_N = (put_tensor(x, device) for x in (torch.cat(values), *factors))
    return scores_RV.view(-1), put_tensor(at_N, device), values_N, by_N
