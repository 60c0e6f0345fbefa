"""A real Chromium, the distribution's own, or the reason why there is none."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

Open = Callable[..., Page]
"""Opens the page: a service's url, a fragment, and what a browser's context takes."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
# the browser says it of every request without a good answer, whatever the page makes of it
REFUSED = re.compile(r"Failed to load resource: (?:the server responded with a status of )?(\S+)")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Started once; each tab gets a context of its own. Skips the test where there is no Chromium."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on PATH; as root, `make browser` installs one")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root in some containers
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Watch:
    """What a tab complains of, and whom it asks."""

    def __init__(self, page: Page) -> None:
        self.complaints: list[str] = []
        self.refused: list[str] = []
        self.urls: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)

    def _heard(self, message: ConsoleMessage) -> None:
        if refused := REFUSED.match(message.text):
            self.refused.append(refused[1])  # a status, or net::ERR_...
        else:
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        self.urls.append(request.url)


def contrast(one: str, other: str) -> float:
    """Of two computed colours, "rgb(r, g, b)" or "color(srgb r g b)". Source: WCAG 2.2, relative luminance."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    numbers = [float(x) for x in colour[colour.index("(") + 1 : -1].replace(",", " ").replace("srgb", "").split()[:3]]
    parts = numbers if colour.startswith("color(") else [x / 255 for x in numbers]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def run(page: Page, prompt: str, **settings: object) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in settings.items():
        field = page.locator(f"#{name}")
        field.evaluate("e => { for (let box = e; box = box.parentElement;) if ('open' in box) box.open = true }")
        field.fill(str(value))
    page.get_by_role("button", name="Run").click()


def done(page: Page) -> None:
    expect(page.locator("#say")).to_contain_text(" tokens in ")


def texts(page: Page) -> list[str]:
    """Of each sample, without the prompt."""
    return page.locator(".text").evaluate_all(
        "all => all.map(e => [...e.querySelectorAll('[data-token]')].map(s => s.textContent).join(''))"
    )
