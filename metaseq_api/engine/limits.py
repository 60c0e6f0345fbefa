"""What one request, and all together, may ask of a model. Knows tokens and samples; not JSON, which has its own words.

The server refuses the same things earlier and names its own fields; this holds whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass

from metaseq_api.core import Request
from metaseq_api.core.request import BOS_ID
from metaseq_api.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Units: tokens the model reads, </s> in front included (the last one generated is never read); samples of a
    prompt; sequences in all."""

    max_seq_len: int
    max_samples: int = 16
    max_queue: int = 4096

    def check(self, request: Request, vocab_size: int) -> None:
        """Raises: RequestError naming the field that asks for too much."""
        p, window = request.params, self.max_seq_len
        if not request.prompts:
            raise RequestError("prompt is empty; send at least one", param="prompt")
        if p.num_samples > self.max_samples:
            name = "best_of" if p.best_of else "n"
            raise RequestError(f"{name} is {p.num_samples}; this server draws at most {self.max_samples}", param=name)
        for prompt in request.prompts:
            bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
            if bad is not None:
                raise RequestError(f"prompt holds token {bad}; ids go from 0 to {vocab_size - 1}", param="prompt")
            length = len(prompt) + (prompt[:1] != (BOS_ID,))
            if length + max(p.max_tokens - 1, 0) > window:
                fits = length <= window
                raise RequestError(
                    f"the prompt's {length} tokens (</s> included) and max_tokens {p.max_tokens}, the last of which "
                    f"needs no place, do not fit this model's window of {window}: "
                    + (f"ask for at most {window + 1 - length}" if fits else "shorten the prompt"),
                    param="max_tokens" if fits else "prompt",
                )
