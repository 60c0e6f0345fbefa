"""What the engine keeps beside a Sequence: its text, its log-probabilities, and the Completion these end in.

Knows text and when it ends. Does not know blocks, batches or ranks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from metaseq_api.core import Completion, FinishReason, RankedToken, Sequence, TokenLogprobs
from metaseq_api.engine.nucleus import SENTENCE_ENDS, DecayingTopP
from metaseq_api.engine.penalties import Adjustment
from metaseq_api.engine.sampler import Row, Scored
from metaseq_api.engine.teller import Teller
from metaseq_api.scheduling.stopping import StopChecker
from metaseq_api.tokenizer import EOS_ID, StreamDecoder, Tokenizer

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
    ending: list[Scored] = field(default_factory=list)
    """The token that ended the sequence and is none of its text, where there is one."""
    prompt_scored: dict[int, Scored] = field(default_factory=dict)
    """By position in the sequence; the first sample of a prompt keeps them for all."""
    ended_by_stop: bool = False
    reason: FinishReason | None = None
    adjustment: Adjustment | None = field(init=False, default=None)
    decaying: DecayingTopP | None = field(init=False, default=None)
    teller: Teller | None = None
    """Of a streamed request."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the client sent it."""
        return self.seq.token_ids[self.num_added : self.seq.prompt_len]

    def _begin(self) -> None:
        """Make what follows the sequence's own tokens; not before its turn comes, for thousands may wait."""
        p = self.seq.params
        self.adjustment = Adjustment.of(p, self.seq.token_ids, self.tokenizer.vocab_size)
        if p.lambda_decay and not p.greedy:
            ends = frozenset(self.tokenizer.encode(mark)[0] for mark in SENTENCE_ENDS)
            self.decaying = DecayingTopP(top_p=p.top_p, decay=p.lambda_decay, bound=p.omega_bound, ends=ends)

    def row(self) -> Row:
        """What the sampler must know for the next token."""
        p = self.seq.params
        if self.seq.num_generated == 0:
            self._begin()
        forbidden: tuple[int, ...] = ()
        if self.seq.num_generated < p.min_tokens:
            forbidden = (EOS_ID, *(t for t in p.stop_token_ids if t < self.tokenizer.vocab_size))
        elif p.ignore_eos:
            forbidden = (EOS_ID,)
        return Row(
            params=p,
            uniform=0.0 if p.greedy else self.rng.random(),
            top_p=p.top_p if self.decaying is None else self.decaying.value,
            forbidden=forbidden,
            adjustment=self.adjustment,
        )

    def take(self, scored: Scored, eos_id: int) -> None:
        """Note a sampled token (already in seq.token_ids), and whether it ends the sequence."""
        p, seq = self.seq.params, self.seq
        is_end = scored.token_id in p.stop_token_ids
        if scored.token_id == eos_id or (is_end and not p.include_stop_str_in_output):
            self.reason = FinishReason.STOP
            self.ending.append(scored)
            return
        for watcher in (self.adjustment, self.decaying):
            if watcher is not None:
                watcher.note(scored.token_id)
        self.scored.append(scored)
        full = len(seq.token_ids) >= seq.max_len
        piece = self.decoder.push(scored.token_id) + (self.decoder.finish() if full else "")
        # a stop string that min_tokens forbade is looked for no more: it lies in the past
        if self.stop.push(piece, check=seq.num_generated >= p.min_tokens):
            self.ended_by_stop = True
            self.reason = FinishReason.STOP
        elif is_end:
            self.reason = FinishReason.STOP
        elif full:
            self.reason = FinishReason.LENGTH

    def completion(self, leader: Track) -> Completion:
        """Put together what goes back; `leader` is the first sample of the same prompt (perhaps this one)."""
        assert self.reason is not None
        p, tok = self.seq.params, self.tokenizer
        self.adjustment = None  # other samples may be long in coming
        prompt_ids = self.prompt_ids
        if not self.ended_by_stop:
            self.stop.push(self.decoder.finish(), check=False)
        text = self.stop.text
        ids = [s.token_id for s in self.scored]
        drawn = [s.logprob or 0.0 for s in (*self.scored, *self.ending)]
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
            logprobs=None if p.logprobs is None else self._logprobs(leader, len(ids), offsets, len(prompt_text + text)),
            first_top=next((s.top[: p.logprobs or 0] for s in (*self.scored, *self.ending)), ()),
            mean_logprob=sum(drawn) / len(drawn) if drawn else 0.0,
            prompt_logprobs=None if p.prompt_logprobs is None else self._prompt_logprobs(leader, p.prompt_logprobs),
        )

    def _prompt_logprobs(self, leader: Track, k: int) -> tuple[dict[int, RankedToken] | None, ...]:
        """One entry per token of the prompt: its k likeliest tokens, and itself, by id."""
        entries: list[dict[int, RankedToken] | None] = [] if self.num_added else [None]
        text = self.tokenizer.token_text
        for at in range(1, self.seq.prompt_len):
            s = leader.prompt_scored[at]
            assert s.logprob is not None
            assert s.rank is not None
            top = {i: RankedToken(text(i), lp, rank) for rank, (i, lp) in enumerate(s.top[:k], start=1)}
            entries.append(top | {s.token_id: RankedToken(text(s.token_id), s.logprob, s.rank)})
        return tuple(entries)

    def _logprobs(self, leader: Track, kept: int, offsets: list[int], end: int) -> TokenLogprobs:
        """The lists of the kept tokens and of the one that ended them; with echo the prompt's before them."""
        rows = self.scored[:kept] + self.ending
        offsets = offsets + [end] * len(self.ending)
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
            k = self.seq.params.logprobs
            # the chosen token always is among them, so that there may be k + 1
            tops = tuple(
                None if s.logprob is None else {text(i): lp for i, lp in (*s.top[:k], (s.token_id, s.logprob))}
                for s in rows
            )
        return TokenLogprobs(
            tokens=tuple(text(s.token_id) for s in rows),
            token_logprobs=tuple(s.logprob for s in rows),
            top_logprobs=tops,
            text_offset=tuple(offsets),
        )
