"""The page as a file: what it refers to, and what a browser is told of it. In a browser: `page/`."""

from __future__ import annotations

import re

import pytest
from flask.testing import FlaskClient
from support.browser import chromium

from metaseq_api.server import page as the_page


def test_the_page_refers_to_nothing_outside_itself() -> None:
    html = the_page.read()
    assert not re.search(r"https?:|[\"'(]//[a-z]|@import|\burl\(|\bsrc=|<iframe|<object", html)
    assert re.findall(r'href="([^"]*)"', html) == ["data:,"]


def test_the_page_writes_text_as_text_and_never_as_html() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|setHTML", the_page.read())


def test_a_browser_is_told_to_run_this_script_and_nothing_else(client: FlaskClient) -> None:
    answer = client.get("/")
    assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_machine_without_a_browser_skips_and_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(pytest.skip.Exception, match="make browser"), chromium():
        raise AssertionError("a browser from nowhere")
