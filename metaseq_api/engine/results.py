"""Finished answers, given again to whoever asks the same: off unless asked for.

An answer's key is everything that decides it: the prompts' ids and every field of SamplingParams; not who asked, nor
the request's id, which the server takes from the new request. Only what is certain (greedy, seeded, or nothing to
sample) is answered from here, unless a number of different answers to keep is given: then a random request is answered
with one of them, drawn anew, from the time that so many are there. Source: EnergonAI's cache_size and cache_list_size
(examples/opt/cache.py), whose key had no sampling fields.

Knows requests and completions. Does not know how they are computed.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq

from metaseq_api.core import Completion, Request, SamplingParams

_Key = tuple[tuple[tuple[int, ...], ...], SamplingParams]
_Answer = tuple[Completion, ...]


class ResultCache:
    """Answers of the `size` requests asked last; of a random one up to `list_size` answers, 0 meaning none.

    Any thread may call it.
    """

    def __init__(self, size: int, list_size: int = 0, rng: random.Random | None = None) -> None:
        assert size > 0
        self._size, self._list_size = size, list_size
        self._rng = rng or random.Random()
        self._answers: OrderedDict[_Key, list[_Answer]] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, request: Request) -> list[Completion] | None:
        """The answer to a request, or None where it must be computed."""
        key, wanted = (request.prompts, request.params), self._wanted(request.params)
        with self._lock:
            kept = self._answers.get(key)
            if kept is None:
                return None
            self._answers.move_to_end(key)
            return list(self._rng.choice(kept)) if len(kept) >= wanted else None

    def add(self, request: Request, completions: Seq[Completion]) -> None:
        """Keep an answer that was computed, if it is one to keep and not there yet."""
        key, wanted = (request.prompts, request.params), self._wanted(request.params)
        if not wanted:
            return
        with self._lock:
            kept = self._answers.setdefault(key, [])
            self._answers.move_to_end(key)
            if len(kept) < wanted and tuple(completions) not in kept:
                kept.append(tuple(completions))
            if len(self._answers) > self._size:
                self._answers.popitem(last=False)

    def _wanted(self, params: SamplingParams) -> int:
        """How many answers must be there before one is given."""
        certain = params.greedy or params.seed is not None or params.max_tokens == 0
        return 1 if certain else self._list_size
