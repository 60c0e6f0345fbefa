"""What a caller in Python gets back: for each prompt its continuations, or what its tokens are worth."""

from __future__ import annotations

from dataclasses import dataclass

from metaseq_api.core.completion import Completion, FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt, as it was given, and its continuations; text, token_ids, ... are the first one's."""

    prompt: str | tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Of all n continuations."""
        return tuple(c.text for c in self.completions)

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> TokenLogprobs | None:
        return self.completions[0].logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The natural log-probability of each token of a text, given </s> and the tokens before it, in parallel tuples.

    None for a </s> that a prompt of ids begins with: it has no context.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float | None, ...]

    @property
    def logprob(self) -> float:
        """That of the whole text: the sum."""
        return sum(p for p in self.token_logprobs if p is not None)
