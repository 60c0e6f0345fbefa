"""A model in this process, asked in the API's own words: what `Client` is to a server, without one.

The same questions, the same refusals, the same answers, since the server's own schema reads and writes them. Knows that
schema and the engine. Does not know HTTP or the terminal.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from metaseq_api.core import Answer, Request
from metaseq_api.errors import EngineStopped
from metaseq_api.resident import Resident
from metaseq_api.server import schema
from metaseq_api.settings import Settings


class Local:
    """Loads on creation. Any number of threads may ask. Raises: MetaseqApiError."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._resident = Resident(settings)
        self._clock = clock

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer. Raises: RequestError naming the field, RankFailed."""
        request, answer, head = self._ask(body)
        try:
            completions = answer.result()
        except EngineStopped as e:
            raise self._resident.why() or e from None
        except BaseException:
            answer.cancel()
            raise
        return schema.render_completion(request, completions, model=head["model"], created=head["created"])

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer's chunks. To stop reading is to give the answer up. Raises: as `complete`."""
        request, answer, head = self._ask({**body, "stream": True})
        try:
            for delta in answer.events():
                choice = {
                    "index": delta.prompt_index * request.params.n + delta.sample_index,
                    "text": delta.text,
                    "logprobs": None if delta.logprobs is None else schema.render_logprobs(delta.logprobs),
                    "finish_reason": None if delta.finish_reason is None else delta.finish_reason.value,
                }
                yield {**head, "choices": [choice]}
        except EngineStopped as e:
            raise self._resident.why() or e from None
        finally:
            answer.cancel()

    def close(self) -> None:
        """End the model; who still waits gets EngineStopped."""
        self._resident.close()

    def _ask(self, body: Mapping[str, Any]) -> tuple[Request, Answer, dict[str, Any]]:
        engine = self._resident.engine
        request = schema.parse_completion(body, engine, self._resident.settings, f"cmpl-{uuid.uuid4().hex}")
        head = {"id": request.request_id, "object": "text_completion", "created": int(self._clock())}
        return request, engine.submit(request), {**head, "model": engine.model_name}
