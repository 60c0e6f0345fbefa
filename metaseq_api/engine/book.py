"""The requests in work and their tracks: which sequence is whose, and which sample of a prompt is its first.

Knows tickets, and what a sequence of each prompt and sample begins with. Does not know when anything is computed.
"""

from __future__ import annotations

import random

from metaseq_api.core import Sequence
from metaseq_api.core.request import BOS_ID
from metaseq_api.engine.teller import Teller
from metaseq_api.engine.ticket import Ticket
from metaseq_api.engine.track import Track
from metaseq_api.scheduling.stopping import StopChecker
from metaseq_api.tokenizer import StreamDecoder, Tokenizer


class Book:
    """Called by the engine's thread alone. Empty when nothing is in work."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._live: dict[int, Track] = {}
        self._leaders: dict[tuple[Ticket, int], Track] = {}
        self._by_ticket: dict[Ticket, list[Track]] = {}
        self._next_id = 0

    def __bool__(self) -> bool:
        return bool(self._by_ticket)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._by_ticket

    @property
    def tickets(self) -> list[Ticket]:
        return list(self._by_ticket)

    def open(self, ticket: Ticket) -> list[Track]:
        """Make a track of each sample of each prompt, prompts outer."""
        tracks = self._by_ticket[ticket] = []
        for p, prompt in enumerate(ticket.request.prompts):
            for s in range(ticket.request.params.num_samples):
                tracks.append(self._track(ticket, p, s, list(prompt)))
        return tracks

    def close(self, ticket: Ticket) -> list[Track]:
        """Forget a request; its tracks."""
        tracks = self._by_ticket.pop(ticket)
        for track in tracks:
            self.drop(track)
            self._leaders.pop((ticket, track.prompt_index), None)
        return tracks

    def of(self, ticket: Ticket) -> list[Track]:
        return self._by_ticket[ticket]

    def leader(self, track: Track) -> Track:
        """The first sample of the same prompt, perhaps this one."""
        return self._leaders[track.ticket, track.prompt_index]

    def compute(self, track: Track) -> None:
        """Note that steps will compute a track, until it is dropped."""
        self._live[track.seq.seq_id] = track

    def drop(self, track: Track) -> None:
        """Note that a track is computed no more."""
        self._live.pop(track.seq.seq_id, None)

    def find(self, seq_id: int) -> Track | None:
        """The track of a sequence, if it is still computed."""
        return self._live.get(seq_id)

    def __getitem__(self, seq_id: int) -> Track:
        return self._live[seq_id]

    def _track(self, ticket: Ticket, prompt_index: int, sample_index: int, prompt: list[int]) -> Track:
        request, params = ticket.request, ticket.request.params
        num_added = 0 if prompt[:1] == [BOS_ID] else 1
        token_ids = [BOS_ID] * num_added + prompt
        leader = self._leaders.get((ticket, prompt_index))
        seed = None if params.seed is None else f"{params.seed}/{prompt_index}/{sample_index}"
        seq = Sequence(
            seq_id=self._next_id,
            prompt_len=len(token_ids),
            token_ids=token_ids,
            group=id(ticket),
            tenant=request.tenant,
            weight=request.weight,
            priority=request.priority,
            params=params,
            max_len=len(token_ids) + params.max_tokens,
            leader=None if leader is None else leader.seq,
            scores_prompt=leader is None and params.scores_prompt and len(token_ids) > 1,
        )
        self._next_id += 1
        track = Track(
            ticket=ticket,
            seq=seq,
            prompt_index=prompt_index,
            sample_index=sample_index,
            num_added=num_added,
            tokenizer=self._tokenizer,
            rng=random.Random(seed),
            stop=StopChecker(params.stop, include=params.include_stop_str_in_output),
            decoder=StreamDecoder(self._tokenizer),
        )
        leader = self._leaders.setdefault((ticket, prompt_index), track)
        if request.stream:
            track.teller = Teller(track, leader)
        return track
