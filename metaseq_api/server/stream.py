"""An answer as server-sent events: each Delta a chunk in the shape of OpenAI's text_completion, then the usage where it
was asked for, then `[DONE]`; a failure is one `{"error": ...}` before that.

Knows the wire. Does not know sockets or threads: whoever has the connection (`channel`) takes the bytes that have come,
as often as it likes, and what has piled up meanwhile becomes one chunk for each choice. The part of a chunk that never
changes is rendered once a stream.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring_ascii as quote

from metaseq_api.core import Answer, Delta, Request, TokenLogprobs
from metaseq_api.errors import EngineStopped, MetaseqApiError, RequestError
from metaseq_api.server import schema

DONE = b"data: [DONE]\n\n"


class Stream:
    """One running answer. One thread at a time may use it.

    `on_end` is called once, with the tokens told and how it ended ("stop", "length", both, or an error's code), or with
    None as the latter where its client left first; `explain` turns what the engine failed with into what a client may
    read.
    """

    kind = "text_completion"

    def __init__(
        self,
        request: Request,
        answer: Answer,
        *,
        model: str,
        created: int,
        include_usage: bool,
        explain: Callable[[MetaseqApiError], dict[str, object]],
        on_end: Callable[[int, str | None], None],
    ) -> None:
        self.ended = False
        self._answer, self._explain, self._on_end = answer, explain, on_end
        self._n = request.params.n
        self._num_prompt_tokens = sum(map(len, request.prompts))
        self._num_tokens = 0
        self._num_alternatives = request.params.logprobs or 0
        self._reasons: set[str] = set()
        self._begun: dict[int, bool] = {}  # by choice: whether any of its text was told
        head = f'{{"id": {quote(request.request_id)}, "object": "{self.kind}", "created": {created}'
        self._head = f'data: {head}, "model": {quote(model)}, "choices": ['
        self._usage = include_usage
        self._tail = '], "usage": null}\n\n' if include_usage else "]}\n\n"

    def watch(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, by any thread, when there is something to take. It must neither block nor fail."""
        self._answer.watch(wake)

    def take(self) -> bytes:
        """What is to be sent now, without waiting; sets `ended` with the last of it."""
        if self.ended:
            return b""
        ended = self._answer.ended
        try:
            deltas = self._answer.take()
        except MetaseqApiError as e:
            return self._fail(e)
        if len(deltas) == 1:
            events = self._render(deltas[0]).encode()
        else:
            events = "".join(map(self._render, merge(deltas))).encode()
        if not ended:
            return events
        try:
            rest = self._answer.take()
        except MetaseqApiError as e:
            return events + self._fail(e)
        assert not rest, "an answer that had ended went on"
        return events + self._finish()

    def give_up(self, error: MetaseqApiError) -> bytes:
        """End it here for a reason of the server's own; the engine frees what it holds. What is to be sent last."""
        if self.ended:
            return b""
        self._answer.cancel()
        return self._fail(error)

    def leave(self) -> None:
        """The client has gone. Harmless when the stream has ended."""
        if not self.ended:
            self.ended = True
            self._answer.cancel()
            self._on_end(self._num_tokens, None)

    def events(self, gone: Callable[[], bool], closing: threading.Event, poll_s: float) -> Iterator[bytes]:
        """All of it, waiting for each part: for a server that gives each stream a thread."""
        woken = threading.Event()
        self.watch(woken.set)
        try:
            while not self.ended:
                if not woken.wait(poll_s) and closing.is_set():
                    yield self.give_up(stopping())
                elif gone():
                    return
                woken.clear()
                if data := self.take():
                    yield data
        finally:
            self.leave()

    def _render(self, delta: Delta) -> str:
        prompt, sample, text, num_tokens, reason, logprobs = delta
        index = prompt * self._n + sample
        if reason is None and logprobs is None:  # nearly every one
            self._num_tokens += num_tokens
            end = '"logprobs": null, "finish_reason": null'
        else:
            self._count(delta)
            scores = "null" if logprobs is None else json.dumps(schema.render_logprobs(logprobs))
            end = f'"logprobs": {scores}, "finish_reason": {json.dumps(reason and reason.value)}'
        return f'{self._head}{{"index": {index}, "text": {quote(text)}, {end}}}{self._tail}'

    def _count(self, delta: Delta) -> None:
        self._num_tokens += delta.num_tokens
        if delta.finish_reason is not None:
            self._reasons.add(delta.finish_reason.value)

    def _finish(self) -> bytes:
        self.ended = True
        self._on_end(self._num_tokens, ",".join(sorted(self._reasons)))
        if not self._usage:
            return DONE
        usage = schema.render_usage(self._num_prompt_tokens, self._num_tokens)
        return f'{self._head}], "usage": {json.dumps(usage)}}}\n\n'.encode() + DONE

    def _fail(self, error: MetaseqApiError) -> bytes:
        self.ended = True
        says = self._explain(error)
        self._on_end(self._num_tokens, error.code)
        return f"data: {json.dumps(says)}\n\n".encode() + DONE


def stopping() -> EngineStopped:
    """Why an answer ends when the server does."""
    return EngineStopped("this server is stopping; send the request to another")


def too_slow(num_bytes: int) -> RequestError:
    """Why a stream ends whose client does not read it."""
    says = f"{num_bytes} bytes of this stream were not read by its client; read faster, or ask for less"
    return RequestError(says, code="slow_reader")


def merge(deltas: list[Delta]) -> list[Delta]:
    """One Delta for each choice, in the order of their first ones."""
    by_choice: dict[tuple[int, int], list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
    return [of[0] if len(of) == 1 else _joined(of) for of in by_choice.values()]


def _joined(deltas: list[Delta]) -> Delta:
    first, lists = deltas[0], [d.logprobs for d in deltas if d.logprobs is not None]
    return Delta(
        first.prompt_index,
        first.sample_index,
        "".join(d.text for d in deltas),
        sum(d.num_tokens for d in deltas),
        deltas[-1].finish_reason,
        TokenLogprobs.joined(lists) if lists else None,
    )
