"""What is read off a step's logits: the next token of each sequence, and the scores of prompts that were asked for.

Knows whose each row is. Does not know what becomes of a token, or how one is chosen (`sampler`).
"""

from __future__ import annotations

import math

from torch import Tensor

from metaseq_api.core import Sequence
from metaseq_api.engine.book import Book
from metaseq_api.engine.sampler import Drawn, Sampler, Scored
from metaseq_api.engine.ticket import Ticket
from metaseq_api.scheduling.scheduler import Step

Row = tuple[Sequence, int]
"""Whose a row of logits is, and the position it was computed at."""


class Reading:
    """One step's, which began at `began`: `take` its logits as they come, then read its `tokens`.

    What is drawn stays on its device until it is read; `drawn` says in which row whose token is (by seq_id). A sequence
    that has ended meanwhile has none. `unsound`: requests to be given up, whose logits are not numbers.
    """

    def __init__(self, step: Step, book: Book, sampler: Sampler, began: float) -> None:
        self.step, self.began = step, began
        self._book, self._sampler = book, sampler
        self._rows: list[Row] = [
            (seq, position)
            for seq, item in zip(step.sequences, step.batch.items, strict=True)
            for position in range(item.context_len - item.num_logits, item.context_len)
        ]
        self._parts: list[Drawn] = []
        self.drawn: dict[int, int] = {}
        self.unsound: set[Ticket] = set()

    def take(self, logits: Tensor) -> None:
        """Read the next rows. Shapes: logits [rows, vocabulary]."""
        here, self._rows = self._rows[: len(logits)], self._rows[len(logits) :]
        self._score_prompts(logits, here)
        self._sample(logits, here)

    @property
    def chosen(self) -> list[Tensor]:
        """The tokens that were drawn, on their device. Shapes: [R] together."""
        return [part.chosen_R for part in self._parts]

    def tokens(self) -> dict[int, Scored | None]:
        """The tokens that were drawn, by seq_id; None where the logits are not numbers. Waits for a GPU."""
        tokens = dict(zip(self.drawn, (scored for part in self._parts for scored in part.read()), strict=True))
        for seq_id, scored in tokens.items():
            if scored is None and (track := self._book.find(seq_id)) is not None:
                self.unsound.add(track.ticket)
        return tokens

    def _score_prompts(self, logits: Tensor, rows: list[Row]) -> None:
        """Note the log-probabilities of prompt tokens: the row at position i scores the token at i + 1."""
        by_seq: dict[int, list[int]] = {}
        for at, (seq, position) in enumerate(rows):
            if seq.scores_prompt and position + 1 < seq.prompt_len:
                by_seq.setdefault(seq.seq_id, []).append(at)
        for seq_id, ats in by_seq.items():
            track, seq = self._book.find(seq_id), rows[ats[0]][0]
            if track is None:
                continue
            targets = [seq.token_ids[rows[at][1] + 1] for at in ats]
            chosen = logits if len(ats) == len(logits) else logits[ats]
            for at, scored in zip(ats, self._sampler.score(chosen, targets, seq.params), strict=True):
                track.prompt_scored[rows[at][1] + 1] = scored
                if scored.logprob is None or math.isnan(scored.logprob):
                    self.unsound.add(track.ticket)

    def _sample(self, logits: Tensor, rows: list[Row]) -> None:
        ats, tracks = [], []
        for at, (seq, i) in enumerate(rows):
            if i + 1 == len(seq.token_ids) and seq.params.max_tokens:
                track = self._book.find(seq.seq_id)
                if track is not None:
                    ats.append(at)
                    tracks.append(track)
        if not ats:
            return
        chosen = logits if len(ats) == len(logits) else logits[ats]
        self._parts.append(self._sampler.draw(chosen, [t.row() for t in tracks]))
        for track in tracks:
            self.drawn[track.seq.seq_id] = len(self.drawn)
