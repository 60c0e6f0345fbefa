"""The routes around completions: what is served, how it does, its tokens, and the conversation in front of it.

Knows HTTP. Does not know the fields of the bodies (`chat`, `tokens`), the metrics' names, or what /openapi.json says.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable

from flask import Flask, Response

from metaseq_api import __version__
from metaseq_api.core import EngineProtocol
from metaseq_api.errors import NotFound
from metaseq_api.server import chat, docs_page, openapi, schema, template, tokens
from metaseq_api.server.asker import Asker
from metaseq_api.server.later import Later
from metaseq_api.server.metrics import CONTENT_TYPE, Metrics
from metaseq_api.server.wire import read_json, to_json
from metaseq_api.settings import Settings


class Around:
    """The views of one app."""

    def __init__(
        self,
        engine: EngineProtocol,
        settings: Settings,
        asker: Asker,
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        closing: threading.Event,
    ) -> None:
        """Raises: SettingsError where the chat template cannot be read."""
        self.engine, self.settings, self.asker = engine, settings, asker
        self.clock, self.new_id, self.closing = clock, new_id, closing
        self.started = int(clock())
        self.metrics = Metrics(engine)
        self.template = template.load(settings.chat_template)
        self.document = openapi.document(engine, settings)
        self.html = docs_page.render(self.document)

    def install(self, app: Flask) -> None:
        """Register every route."""
        for path, view, method in (
            ("/v1/models", self.models, "GET"),
            ("/v1/models/<path:model>", self.model, "GET"),
            ("/v1/chat/completions", self.chat, "POST"),
            ("/chat/completions", self.chat, "POST"),
            ("/tokenize", self.tokenize, "POST"),
            ("/detokenize", self.detokenize, "POST"),
            ("/tokenizer_info", self.tokenizer_info, "GET"),
            ("/logprobs", self.logprobs, "POST"),
            ("/version", self.version, "GET"),
            ("/health", self.health, "GET"),
            ("/ready", self.ready, "GET"),
            ("/metrics", self.scrape, "GET"),
            ("/openapi.json", self.openapi, "GET"),
            ("/docs", self.docs, "GET"),
        ):
            app.add_url_rule(path, f"around {path}", view, methods=[method])

    # what is served

    def models(self) -> Response:
        return to_json({"object": "list", "data": [self._card()]})

    def model(self, model: str) -> Response:
        if model != self.engine.model_name:
            says = f"there is no such model here; GET /v1/models names the one there is ({self.engine.model_name})"
            raise NotFound(says, param="model", code="model_not_found")
        return to_json(self._card())

    def version(self) -> Response:
        return to_json({"version": __version__})

    def openapi(self) -> Response:
        return to_json(self.document)

    def docs(self) -> Response:
        headers = {"Content-Security-Policy": docs_page.CONTENT_POLICY, "Cache-Control": "no-cache"}
        return Response(self.html, mimetype="text/html", headers=headers)

    # how it does

    def health(self) -> Response:
        """200 while requests are answered and every rank is heard of, else 503; never waits for the model."""
        health = self.engine.health()
        alive = health.alive and not self.closing.is_set()
        answer = {
            "status": "stopped" if not alive else "stuck" if health.stuck else "ok",
            "model": self.engine.model_name,
            **dataclasses.asdict(health),
            "rank_age_s": [round(age, 3) if math.isfinite(age) else None for age in health.rank_age_s],
        }
        return to_json(answer, 200 if answer["status"] == "ok" else 503)

    def ready(self) -> Response:
        """200 where a request sent now would be begun. While the model is loaded nothing listens on the port yet."""
        ready = self.engine.health().ready and not self.closing.is_set()
        return to_json({"ready": ready}, 200 if ready else 503)

    def scrape(self) -> Response:
        return Response(self.metrics.text(), content_type=CONTENT_TYPE)

    # tokens

    def tokenize(self) -> Response:
        return to_json(tokens.tokenize(read_json(), self.engine))

    def detokenize(self) -> Response:
        return to_json(tokens.detokenize(read_json(), self.engine))

    def tokenizer_info(self) -> Response:
        return to_json(tokens.tokenizer_info(self.engine, self.template.source))

    def logprobs(self) -> Later:
        body = read_json()
        request = tokens.parse_logprobs(body, self.engine, self.settings, f"logp-{self.new_id()}")
        cache_id = tokens.read_cache_id(body)
        request = self.asker.admit(request, body)
        return self.asker.complete(request, lambda completions: tokens.render_logprobs(completions, cache_id))

    # conversations

    def chat(self) -> Later:
        body, created = read_json(), int(self.clock())
        request_id = f"chatcmpl-{self.new_id()}"
        request = chat.parse_chat(body, self.engine, self.settings, self.template, request_id)
        request = self.asker.admit(request, body)
        if request.stream:
            return self.asker.stream(request, schema.wants_usage(body), chat.ChatStream)
        model = self.engine.model_name
        return self.asker.complete(request, lambda done: chat.render_chat(request, done, model=model, created=created))

    def _card(self) -> dict[str, object]:
        return {
            "id": self.engine.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "metaseq-api",
            "max_model_len": self.engine.max_seq_len,
        }
