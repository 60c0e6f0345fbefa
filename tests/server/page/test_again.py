"""What a person takes away from the page and comes back with: links, keys, commands, history."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import flask
from flask import Flask
from playwright.sync_api import expect
from support.browser import Open, done, run, texts
from support.fake_engine import FakeEngine
from support.processes import clean_env, until
from support.service import Service

from metaseq_api.errors import NotAuthorized
from metaseq_api.server.run import Server

KEY = "a-key-of-this-test-alone"


def test_a_link_restores_prompt_and_settings_and_holds_no_key(service: Service, tab: Open) -> None:
    page = tab(service.url)
    page.locator("#keys > summary").click()
    page.get_by_label("Key", exact=True).fill(KEY)
    given = {"max_tokens": "20", "temperature": "0.35", "seed": "7", "stop": "\\n\nend & so=on", "top_k": "40"}
    run(page, "Größe #1 & 100 %\n日本", **given)
    done(page)
    page.get_by_role("button", name="Share link").click()
    expect(page.locator("#say")).to_contain_text("never the key")
    link = page.url
    assert KEY not in link
    fragment = link.removeprefix(f"{service.url}/")
    assert fragment.startswith("#")
    other = tab(service.url, fragment)
    expect(other.get_by_label("Prompt", exact=True)).to_have_value("Größe #1 & 100 %\n日本")
    for name, value in given.items():
        expect(other.locator(f"#{name}")).to_have_value(value)
    expect(other.locator("#temperature-slider")).to_have_value("0.35")
    expect(other.locator("#columns")).to_be_empty()
    other.locator("#max_tokens").fill("21")
    expect(other).not_to_have_url(re.compile("#"))  # an edited page is no longer what its link says


def test_the_key_is_sent_and_kept_nowhere_but_in_its_tab(
    app: Flask, server: Server, tab: Open, refusals: list[str]
) -> None:
    def check() -> None:
        wants = flask.request.path.startswith("/v1/")
        if wants and flask.request.headers.get("Authorization") != f"Bearer {KEY}":
            raise NotAuthorized("this service wants a key; send it as Authorization: Bearer KEY")

    app.before_request_funcs.setdefault(None, []).append(check)
    refusals.append("401")
    page = tab(server.url)
    run(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("wants a key")
    key = page.get_by_label("Key", exact=True)
    expect(key).to_be_focused()
    expect(key).to_have_attribute("aria-invalid", "true")
    page.keyboard.type(KEY)
    page.keyboard.press("Control+Enter")
    done(page)
    expect(page.locator("#service")).to_contain_text("window 512")
    assert page.evaluate("JSON.stringify(localStorage)").find(KEY) == -1
    assert page.evaluate("sessionStorage.getItem('key')") == KEY
    assert KEY not in page.url
    assert KEY not in page.locator("body").inner_text()
    assert "$METASEQ_API_KEY" in (page.locator("#curl").text_content() or "")
    page.reload()
    expect(key).to_have_value(KEY)


def test_the_curl_and_the_python_shown_give_the_text_shown(service: Service, tab: Open, tmp_path: Path) -> None:
    page = tab(service.url)
    prompt = "Return the 'a' of \"b\"\\ $HOME `x` é\n"
    run(page, prompt, max_tokens=24, temperature=0, seed=3, min_p=0.01, stop="zzz\nyyy")
    done(page)
    shell = subprocess.run(["bash", "-c", page.locator("#curl").text_content() or ""], capture_output=True, check=True)
    assert [c["text"] for c in json.loads(shell.stdout)["choices"]] == texts(page)
    (tmp_path / "shown.py").write_text(page.locator("#python").text_content() or "", "utf-8")
    program = [sys.executable, str(tmp_path / "shown.py")]
    said = subprocess.run(program, capture_output=True, check=True, env=clean_env(PYTHONIOENCODING="utf-8"))
    assert said.stdout.decode() == texts(page)[0] + "\n"


def test_what_is_shown_can_be_copied(service: Service, tab: Open) -> None:
    page = tab(service.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_text("As curl").click()
    page.get_by_role("button", name="Copy the curl command").click()
    expect(page.locator("#say")).to_have_text("Copied the curl text.")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#curl").text_content()


def test_regenerate_asks_again_with_the_next_seed(server: Server, engine: FakeEngine, tab: Open) -> None:
    page = tab(server.url)
    expect(page.get_by_role("button", name="Regenerate")).to_be_disabled()
    run(page, "One", max_tokens=3, seed=5)
    done(page)
    page.get_by_label("Prompt", exact=True).fill("Two")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#seed")).to_have_value("6")
    until(lambda: len(engine.requests) == 2, "a second request")
    first, second = engine.requests
    assert second.prompts == first.prompts
    assert (first.params.seed, second.params.seed) == (5, 6)


def test_the_history_outlives_the_tab_and_can_be_forgotten(server: Server, tab: Open) -> None:
    page = tab(server.url)
    run(page, "First", max_tokens=3, n=2)
    done(page)
    run(page, "Second", max_tokens=4, n=1)
    expect(page.locator("#past-count")).to_have_text("(2)")
    page.reload()
    page.get_by_text("History (2)").click()
    page.get_by_role("button", name="First").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("First")
    expect(page.locator("#max_tokens")).to_have_value("3")
    assert texts(page) == ["abc", "bcd"]
    page.get_by_role("button", name="Forget the history").click()
    expect(page.locator("#past-count")).to_have_text("(0)")
    assert page.evaluate("localStorage.getItem('history')") is None


def test_an_example_fills_the_form_and_runs_only_when_told(server: Server, engine: FakeEngine, tab: Open) -> None:
    page = tab(server.url)
    for button in page.get_by_role("group", name="Examples").get_by_role("button").all():
        button.click()
        expect(page.locator("#say")).to_contain_text(button.inner_text())
    expect(page.locator("#temperature")).to_have_value("0")
    assert engine.requests == []
