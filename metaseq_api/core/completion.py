"""What goes back to the client. Does not know JSON; `server/schema.py` writes that."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import NamedTuple


class FinishReason(str, Enum):
    """Why a completion ended: `stop` (end of text or a stop string) or `length` (max_tokens or the model's window)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Per token, in parallel lists of one length, echoed prompt first where it was asked for.

    tokens: the token as text; a token that is not valid UTF-8 by itself as `bytes:\\xe2\\x80`.
    token_logprobs: natural logarithms; None where there is no context to condition on.
    top_logprobs: {token text: logprob} of the likeliest; None as above, or where logprobs was 0.
    text_offset: Units: characters from the start of prompt + completion to the token's first byte.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...] | None
    text_offset: tuple[int, ...]

    @staticmethod
    def joined(lists: Seq[TokenLogprobs]) -> TokenLogprobs:
        """Those of one text after another, of which there is at least one."""
        tops = [x.top_logprobs for x in lists if x.top_logprobs is not None]
        return TokenLogprobs(
            tokens=tuple(chain.from_iterable(x.tokens for x in lists)),
            token_logprobs=tuple(chain.from_iterable(x.token_logprobs for x in lists)),
            top_logprobs=tuple(chain.from_iterable(tops)) if tops else None,
            text_offset=tuple(chain.from_iterable(x.text_offset for x in lists)),
        )

    def after(self, num: int) -> TokenLogprobs:
        """The lists without their first `num` entries."""
        return self._part(slice(num, None))

    def first(self, num: int) -> TokenLogprobs:
        """Their first `num` entries."""
        return self._part(slice(num))

    def _part(self, part: slice) -> TokenLogprobs:
        top = self.top_logprobs
        return TokenLogprobs(
            tokens=self.tokens[part],
            token_logprobs=self.token_logprobs[part],
            top_logprobs=None if top is None else top[part],
            text_offset=self.text_offset[part],
        )


@dataclass(frozen=True, slots=True)
class RankedToken:
    """A token as text, its log-probability, and its rank at its place: 1 for the likeliest."""

    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished continuation. `text` has the prompt in front where echo was asked for, and a stop string only
    where include_stop_str_in_output was.

    num_prompt_tokens leaves out the </s> that the engine puts in front; num_tokens counts what was generated.
    logprobs: of token_ids; then, where </s> or a stop token ended it and is none of these, of that token too, as OpenAI
    and vLLM list it: whoever counts entries has one for every token that was drawn.
    mean_logprob: what best_of ranks by; over the generated tokens and the </s> that ended them, so that an empty text
    is judged too. first_top: of the first place, the likeliest ids with their log-probabilities, as many as `logprobs`
    asked for. prompt_logprobs: for each of num_prompt_tokens, by id; None for a </s> that the client itself sent.
    """

    prompt_index: int
    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    logprobs: TokenLogprobs | None = None
    mean_logprob: float = 0.0
    first_top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[dict[int, RankedToken] | None, ...] | None = None

    @property
    def logprobs_of_text(self) -> TokenLogprobs | None:
        """The lists without the token that ended the text: metaseq's."""
        return None if self.logprobs is None else self.logprobs.first(len(self.token_ids))


class Delta(NamedTuple):
    """What was added to one sample of a streamed request; all of them, joined in order, are its Completion.

    `text` is final: no stop string can take it back, no character in it is unfinished. num_tokens counts the generated
    tokens it stands for; these may come before their text. finish_reason is that of the sample's last delta alone.
    """

    prompt_index: int
    sample_index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None

    @staticmethod
    def of(completion: Completion) -> Delta:
        """The whole of a sample in one."""
        return Delta(
            prompt_index=completion.prompt_index,
            sample_index=completion.sample_index,
            text=completion.text,
            num_tokens=completion.num_tokens,
            finish_reason=completion.finish_reason,
            logprobs=completion.logprobs,
        )
