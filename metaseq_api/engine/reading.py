"""What is read off a step's logits: the next token of each sequence, and the scores of prompts that were asked for.

Knows whose each row is. Does not know what becomes of a token, or how one is chosen (`sampler`).
"""

from __future__ import annotations

import math

from torch import Tensor

from metaseq_api.core import Sequence
from metaseq_api.engine.book import Book
from metaseq_api.engine.sampler import Sampler, Scored
from metaseq_api.engine.ticket import Ticket
from metaseq_api.scheduling.scheduler import Step

Row = tuple[Sequence, int]
"""Whose a row of logits is, and the position it was computed at."""


class Reading:
    """One step's. `tokens` by seq_id, None where the logits are not numbers; `unsound`: requests to be given up."""

    def __init__(self, step: Step, book: Book, sampler: Sampler) -> None:
        self._book, self._sampler = book, sampler
        self._rows: list[Row] = [
            (seq, position)
            for seq, item in zip(step.sequences, step.batch.items, strict=True)
            for position in range(item.context_len - item.num_logits, item.context_len)
        ]
        self.tokens: dict[int, Scored | None] = {}
        self.unsound: set[Ticket] = set()

    def take(self, logits: Tensor) -> None:
        """Read the next rows. Shapes: logits [rows, vocabulary]."""
        here, self._rows = self._rows[: len(logits)], self._rows[len(logits) :]
        self._score_prompts(logits, here)
        self._sample(logits, here)

    def _score_prompts(self, logits: Tensor, rows: list[Row]) -> None:
        """Note the log-probabilities of prompt tokens: the row at position i scores the token at i + 1."""
        by_seq: dict[int, list[int]] = {}
        for at, (seq, position) in enumerate(rows):
            if seq.scores_prompt and position + 1 < seq.prompt_len:
                by_seq.setdefault(seq.seq_id, []).append(at)
        for seq_id, ats in by_seq.items():
            track, seq = self._book[seq_id], rows[ats[0]][0]
            targets = [seq.token_ids[rows[at][1] + 1] for at in ats]
            chosen = logits if len(ats) == len(logits) else logits[ats]
            for at, scored in zip(ats, self._sampler.score(chosen, targets, seq.params), strict=True):
                track.prompt_scored[rows[at][1] + 1] = scored
                if scored.logprob is None or math.isnan(scored.logprob):
                    self.unsound.add(track.ticket)

    def _sample(self, logits: Tensor, rows: list[Row]) -> None:
        ats = [at for at, (seq, i) in enumerate(rows) if i + 1 == len(seq.token_ids) and seq.params.max_tokens]
        if not ats:
            return
        chosen = logits if len(ats) == len(logits) else logits[ats]
        tracks = [self._book[rows[at][0].seq_id] for at in ats]
        for track, scored in zip(tracks, self._sampler.sample(chosen, [t.row() for t in tracks]), strict=True):
            self.tokens[track.seq.seq_id] = scored
            if scored is None:
                self.unsound.add(track.ticket)
