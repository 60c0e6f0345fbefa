"""The page as a file: what it refers to and what a browser is told. A real browser comes with the playground."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from flask.testing import FlaskClient


class _Reader(HTMLParser):
    """Every tag with its attributes, and every label."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.named: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "label" and found.get("for"):
            self.named.add(str(found["for"]))
        if "label" in self.open and found.get("id"):
            self.named.add(str(found["id"]))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def html(client: FlaskClient) -> str:
    answer = client.get("/")
    assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    return answer.text


def test_the_page_refers_to_nothing_outside_itself(html: str) -> None:
    reader = _Reader()
    reader.feed(html)
    assert reader.open == []
    for tag, attrs in reader.tags:
        assert not set(attrs) & {"src", "action", "srcset", "background"}, tag
        assert (attrs.get("href") or "data:,") == "data:,"
    assert not re.search(r"https?:|//[a-z]|@import|\burl\(", html)


def test_a_browser_is_told_to_load_nothing_from_elsewhere(client: FlaskClient) -> None:
    policy = client.get("/").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "connect-src 'self'" in policy
    assert client.get("/").headers["X-Content-Type-Options"] == "nosniff"


def test_every_input_of_the_page_has_a_label_and_every_name_in_its_script_an_element(html: str) -> None:
    reader = _Reader()
    reader.feed(html)
    ids = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    inputs = {attrs["id"] for tag, attrs in reader.tags if tag in ("input", "textarea")}
    assert inputs == {"prompt", "max_tokens", "temperature", "top_p"}
    assert inputs <= reader.named
    assert set(re.findall(r'at\("(\w+)"\)', html)) <= ids


def test_the_page_fits_a_phone_and_the_dark(html: str) -> None:
    assert 'name="viewport" content="width=device-width' in html
    assert "color-scheme: light dark" in html


def test_the_page_writes_text_as_text_and_never_as_html(html: str) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", html)
