"""What of one sample a stream can be told now: nothing that a later token can take back, and nothing later than that.

Knows how much was told. Does not know when a sample ends, or who listens; `Track` keeps what is told of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metaseq_api.core import Completion, Delta, TokenLogprobs
from metaseq_api.tokenizer import StreamOffsets

if TYPE_CHECKING:
    from metaseq_api.engine.track import Track


class Teller:
    """The Deltas of one sample; `leader` is the first sample of the same prompt (perhaps this one).

    A stop string may yet cut what follows `StopChecker.num_safe`; tokens that begin before it are kept, whatever comes.
    """

    def __init__(self, track: Track, leader: Track) -> None:
        self._track, self._leader = track, leader
        self._params = track.seq.params
        self._offsets = StreamOffsets(track.tokenizer)
        self._waiting: list[int] = []  # where the tokens begin that were scored and not yet told
        self._num_prompt_chars = 0
        self._begun = self._says_words = False
        # told of the generated part alone
        self._num_chars = self._num_tokens = self._num_entries = 0

    def word(self) -> str | None:
        """What became final, where that is the text of one more token of the only sample, as it nearly always is; else
        None, and `tell` is to be asked."""
        track = self._track
        if not self._says_words or len(track.scored) != self._num_tokens + 1:
            return None
        safe = track.stop.num_safe
        word = track.stop.text[self._num_chars : safe]
        if not word:
            return None
        self._num_chars, self._num_tokens = safe, len(track.scored)
        return word

    def tell(self) -> Delta | None:
        """What became final since the last time, the echoed prompt in front of all; None where nothing did."""
        track, front, entries = self._track, "", None
        safe = track.stop.num_safe
        first = not self._begun
        if first:
            front = self._begin()
        text = front + track.stop.text[self._num_chars : safe]
        if self._params.logprobs is not None:
            entries = self._tell_entries(safe, with_prompt=first and self._params.echo)
        if not text and not (entries and entries.tokens):
            return None
        num = len(track.scored) - self._num_tokens
        self._num_chars, self._num_tokens = safe, self._num_tokens + num
        return Delta(track.prompt_index, track.sample_index, text, num, None, entries)

    def tell_rest(self, completion: Completion) -> Delta:
        """All that was not told of a sample that has ended."""
        echoed = self._begun and self._params.echo
        chars, entries = self._num_chars, self._num_entries
        if echoed:
            chars, entries = chars + self._num_prompt_chars, entries + len(self._track.prompt_ids)
        return Delta(
            completion.prompt_index,
            completion.sample_index,
            completion.text[chars:],
            completion.num_tokens - self._num_tokens,
            completion.finish_reason,
            completion.logprobs and completion.logprobs.after(entries),
        )

    def _begin(self) -> str:
        """The echoed prompt. Its length is wanted for offsets without an echo too."""
        self._begun = True
        self._says_words = self._params.logprobs is None and self._track.ticket.num_sequences == 1
        if not self._params.echo and self._params.logprobs is None:
            return ""
        text = self._track.tokenizer.decode(self._track.prompt_ids)
        self._num_prompt_chars = len(text)
        return text if self._params.echo else ""

    def _tell_entries(self, safe: int, *, with_prompt: bool) -> TokenLogprobs:
        track, at = self._track, self._num_entries
        self._waiting += [self._offsets.push(s.token_id) for s in track.scored[at + len(self._waiting) :]]
        num = sum(1 for offset in self._waiting if offset < safe)
        rows = track.scored[at : at + num]
        offsets = [self._num_prompt_chars + offset for offset in self._waiting[:num]]
        if with_prompt:
            rows = track.prompt_rows(self._leader) + rows
            offsets = track.tokenizer.offsets(track.prompt_ids) + offsets
        del self._waiting[:num]
        self._num_entries += num
        return track.lists(rows, offsets)
