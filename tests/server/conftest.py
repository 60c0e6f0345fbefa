"""The app around a fake engine, as flask's test client and as a real server on a free port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.fake_engine import FakeEngine

from metaseq_api.server.app import create_app
from metaseq_api.server.port import bind
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def settings() -> Settings:
    return Settings(max_beam=4, max_queue=100)


@pytest.fixture
def app(engine: FakeEngine, settings: Settings) -> Flask:
    return create_app(engine, settings)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def server(app: Flask, engine: FakeEngine) -> Iterator[Server]:
    """Serving from a thread; whatever a test left waiting is let go at the end."""
    server = Server(app, bind("127.0.0.1", 0), threads=8)
    server.start()
    yield server
    engine.free.set()
    server.stop(5)
