"""A server of files on this machine, and a folder to fetch them to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.file_server import FileServer, loopback_only, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    loopback_only(monkeypatch)
    with serving() as server:
        yield server
