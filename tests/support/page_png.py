"""Writes a picture of the page as it looks now, before the demo model: page_png.py FILE."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from support.browser import chromium, done, run
from support.service import Service

SIZE = {"width": 1280, "height": 960}


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        service = Service(Path(folder))
        try:
            page = browser.new_page(viewport=SIZE, color_scheme="light")
            page.goto(f"{service.url}/")
            page.get_by_text("demo · window").wait_for()
            run(page, "Return the number of", n=2, seed=12, max_tokens=48)
            done(page)
            page.get_by_text("0 running").wait_for()
            page.evaluate("scrollTo(0, 0)")  # filling in the seed had brought its field into sight
            page.locator("article").last.locator("[data-token]").nth(12).hover()
            page.screenshot(path=target)
        finally:
            service.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
