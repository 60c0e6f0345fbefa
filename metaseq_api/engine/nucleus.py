"""metaseq's "factual nucleus": a top_p that shrinks within a sentence and starts anew with the next.

Knows one sequence's tokens as they come. Does not know how top_p is applied.
"""

from __future__ import annotations

SENTENCE_ENDS = ".?!"


class DecayingTopP:
    """top_p for one sequence's next token: max(bound, top_p * decay ** (t - 1)), where t tokens followed the last
    sentence end, so that the first two tokens of a sentence both get the whole top_p.

    Source: arXiv 2206.04624, 3.1; metaseq sequence_generator.py:391-395, 435-470.
    """

    def __init__(self, *, top_p: float, decay: float, bound: float, ends: frozenset[int]) -> None:
        self._start, self._decay, self._bound, self._ends = top_p, decay, bound, ends
        self._since_end = 0
        self.value = top_p

    def note(self, token_id: int) -> None:
        """A token was generated."""
        self._since_end = 0 if token_id in self._ends else self._since_end + 1
        self.value = max(self._bound, self._start * self._decay ** max(0, self._since_end - 1))
