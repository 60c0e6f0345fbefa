"""A real server around a real engine with a tiny model, for clients that are real too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import flask
import pytest
from support.engines import running_engine

from metaseq_api.engine.engine import Engine
from metaseq_api.server.app import create_app
from metaseq_api.server.port import bind
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings


@dataclass(frozen=True)
class Running:
    """A service in this process, and a count of what it was asked."""

    url: str
    engine: Engine
    asked: list[str]


def serve(folder: Path, settings: Settings) -> Iterator[Running]:
    asked: list[str] = []
    with running_engine(folder) as engine:
        app = create_app(engine, settings)
        app.before_request(lambda: asked.append(flask.request.path))
        server = Server(app, bind("127.0.0.1", 0), threads=16)
        server.start()
        try:
            yield Running(server.url, engine, asked)
        finally:
            server.stop(5)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from serve(tmp_path_factory.mktemp("service"), Settings(max_beam=8))


@pytest.fixture(scope="module")
def compat_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With --metaseq-compat."""
    yield from serve(tmp_path_factory.mktemp("compat"), Settings(max_beam=8, metaseq_compat=True))
