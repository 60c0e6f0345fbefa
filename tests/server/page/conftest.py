"""The page in a real Chromium, before the real service or a fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from support.browser import Open, Watch, chromium
from support.fake_engine import FakeEngine
from support.processes import DEADLINE_S
from support.service import Service

expect.set_options(timeout=DEADLINE_S * 1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The real thing: the demo model behind the real door."""
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    service.kill()


@pytest.fixture
def engine() -> FakeEngine:
    """With room for what the page asks at first."""
    return FakeEngine(max_seq_len=512)


@pytest.fixture
def refusals() -> list[str]:
    """The statuses other than 200, and failures, that a test means to see."""
    return []


@pytest.fixture
def tab(browser: Browser, refusals: list[str]) -> Iterator[Open]:
    """Opens the page in a profile of its own; at the end nobody has complained, and no other host was asked."""
    opened: list[tuple[Page, Watch, str]] = []

    def open_tab(url: str | None, fragment: str = "", **options: Any) -> Page:
        assert url
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        context.set_default_timeout(DEADLINE_S * 1000)
        page = context.new_page()
        opened.append((page, Watch(page), url))
        page.goto(f"{url}/{fragment}")
        expect(page.locator("#service")).to_contain_text("running")
        return page

    yield open_tab
    for page, watch, url in opened:
        page.context.close()
        assert watch.complaints == []
        assert set(watch.refused) <= set(refusals)
        assert [u for u in watch.urls if not u.startswith((f"{url}/", "data:,"))] == []
