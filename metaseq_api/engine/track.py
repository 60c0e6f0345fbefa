"""What the engine keeps beside a Sequence: its text, its log-probabilities, and the Completion these end in.

Knows text and when it ends. Does not know blocks, batches or ranks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from metaseq_api.core import Completion, FinishReason, Sequence, TokenLogprobs
from metaseq_api.engine.sampler import Row, Scored
from metaseq_api.engine.teller import Teller
from metaseq_api.scheduling.stopping import StopChecker
from metaseq_api.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from metaseq_api.engine.ticket import Ticket


@dataclass(slots=True, kw_only=True, eq=False)
class Track:
    """One sample of one prompt, from its first token to its Completion."""

    ticket: Ticket
    seq: Sequence
    prompt_index: int
    sample_index: int
    num_added: int
    """1 where the engine put </s> in front, 0 where the client sent it: then it is a token of the prompt."""
    tokenizer: Tokenizer
    rng: random.Random
    stop: StopChecker
    decoder: StreamDecoder
    scored: list[Scored] = field(default_factory=list)
    prompt_scored: dict[int, Scored] = field(default_factory=dict)
    """By position in the sequence; the first sample of a prompt keeps them for all."""
    ended_by_stop: bool = False
    reason: FinishReason | None = None
    teller: Teller | None = None
    """Of a streamed request."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the client sent it."""
        return self.seq.token_ids[self.num_added : self.seq.prompt_len]

    def row(self) -> Row:
        """What the sampler must know for the next token."""
        p = self.seq.params
        allow_eos = not p.ignore_eos and self.seq.num_generated >= p.min_tokens
        return Row(params=p, uniform=0.0 if p.greedy else self.rng.random(), allow_eos=allow_eos)

    def take(self, scored: Scored, eos_id: int) -> None:
        """Note a sampled token (already in seq.token_ids), and whether it ends the sequence."""
        p, seq = self.seq.params, self.seq
        if scored.token_id == eos_id:
            self.reason = FinishReason.STOP
            return
        self.scored.append(scored)
        full = len(seq.token_ids) >= seq.max_len
        piece = self.decoder.push(scored.token_id) + (self.decoder.finish() if full else "")
        # a stop string that min_tokens forbade is looked for no more: it lies in the past
        if self.stop.push(piece, check=seq.num_generated >= p.min_tokens):
            self.ended_by_stop = True
            self.reason = FinishReason.STOP
        elif full:
            self.reason = FinishReason.LENGTH

    def completion(self, leader: Track) -> Completion:
        """Put together what goes back; `leader` is the first sample of the same prompt (perhaps this one)."""
        assert self.reason is not None
        p, tok = self.seq.params, self.tokenizer
        prompt_ids = self.prompt_ids
        if not self.ended_by_stop:
            self.stop.push(self.decoder.finish(), check=False)
        text = self.stop.text
        ids = [s.token_id for s in self.scored]
        prompt_text = tok.decode(prompt_ids) if p.echo or p.logprobs is not None else ""
        offsets: list[int] = []
        if self.ended_by_stop or p.logprobs is not None:
            # apart, as the text is decoded: a prompt of ids may end inside a character
            behind = len(tok.decode(prompt_ids))
            offsets = [*tok.offsets(prompt_ids), *(behind + o for o in tok.offsets(ids))]
        if self.ended_by_stop:  # a token that begins behind the cut goes with it
            start = offsets[len(prompt_ids)] if ids else 0
            kept = sum(1 for o in offsets[len(prompt_ids) :] if o - start < len(text))
            ids, offsets = ids[:kept], offsets[: len(prompt_ids) + kept]
        return Completion(
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            text=prompt_text + text if p.echo else text,
            token_ids=tuple(prompt_ids + ids if p.echo else ids),
            finish_reason=self.reason,
            num_prompt_tokens=len(prompt_ids),
            num_tokens=len(self.scored),
            logprobs=self._logprobs(leader, len(ids), offsets) if p.logprobs is not None else None,
            cumulative_logprob=sum(s.logprob or 0.0 for s in self.scored),
        )

    def _logprobs(self, leader: Track, kept: int, offsets: list[int]) -> TokenLogprobs:
        """The lists of the kept tokens; with echo the prompt's before them."""
        rows = self.scored[:kept]
        if self.seq.params.echo:
            return self.lists(self.prompt_rows(leader) + rows, offsets)
        return self.lists(rows, offsets[len(self.prompt_ids) :])

    def prompt_rows(self, leader: Track) -> list[Scored]:
        """The prompt's tokens, scored.

        The first one has a value too, being conditioned on the </s> in front; only a </s> that the client sent itself
        has none.
        """
        first = [] if self.num_added else [Scored(token_id=self.prompt_ids[0], logprob=None)]
        return [*first, *(leader.prompt_scored[i] for i in range(1, self.seq.prompt_len))]

    def lists(self, rows: list[Scored], offsets: list[int]) -> TokenLogprobs:
        """Scored tokens and where they begin, as they go back."""
        text = self.tokenizer.token_text
        tops = None
        if self.seq.params.logprobs:
            tops = tuple({text(i): lp for i, lp in s.top} if s.logprob is not None else None for s in rows)
        return TokenLogprobs(
            tokens=tuple(text(s.token_id) for s in rows),
            token_logprobs=tuple(s.logprob for s in rows),
            top_logprobs=tops,
            text_offset=tuple(offsets),
        )
