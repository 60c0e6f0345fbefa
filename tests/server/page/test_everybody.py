"""The page for those who have only a keyboard, hear it, hold it in one hand, or want it dark and still."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, expect
from support.browser import Open, contrast, done, run
from support.fake_engine import FakeEngine
from support.processes import DEADLINE_S
from support.service import Service

from metaseq_api.server.run import Server


def test_everything_can_be_done_with_keys_alone(service: Service, tab: Open) -> None:
    page = tab(service.url)
    seen: list[str] = []
    for _ in range(80):
        page.keyboard.press("Tab")
        here = page.evaluate("document.activeElement.id || document.activeElement.innerText || 'body'")
        if seen and here == seen[0]:
            break
        seen.append(here)
    wanted = ("theme", "Docstring", "prompt", "run", "share", "max_tokens-slider", "seed", "tint")
    order = [seen.index(name) for name in wanted]
    assert order == sorted(order)
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Return the")
    page.keyboard.press("Control+Enter")
    done(page)
    expect(page.locator("#prompt")).to_be_focused()
    while not page.evaluate("document.activeElement.classList.contains('text')"):
        page.keyboard.press("Tab")
    alternatives = page.get_by_role("group", name="Alternatives of a token")
    expect(alternatives).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".here")).to_have_attribute("data-token", "1")
    page.keyboard.press("Enter")
    expect(alternatives.get_by_role("button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".text")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).not_to_have_value("Return the")
    expect(page.locator(".text")).to_be_focused()
    page.keyboard.press("Tab")
    expect(alternatives).to_be_hidden()


def test_the_focus_can_be_seen(server: Server, tab: Open) -> None:
    page = tab(server.url)
    for _ in range(12):
        page.keyboard.press("Tab")
        style = page.evaluate("(s => [s.outlineStyle, s.outlineWidth])(getComputedStyle(document.activeElement))")
        assert style == ["solid", "3px"]


def test_every_control_has_a_name(service: Service, tab: Open) -> None:
    page = tab(service.url)
    run(page, "Return the", n=2, max_tokens=4, temperature=0)
    done(page)
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.locator("[data-token]").first.hover()
    snapshot = page.locator("body").aria_snapshot()
    kinds = "button|textbox|slider|spinbutton|combobox|checkbox|option|link"
    controls = re.findall(rf"- '?({kinds})( \"[^\"]+\")?", snapshot)
    assert len(controls) > 50
    assert [kind for kind, name in controls if not name.strip(' "')] == []
    names = [f"{kind}{name}" for kind, name in controls if kind != "option"]
    assert len(names) == len(set(names)), "two controls cannot be told apart"


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_no_width_needs_sideways_scrolling(service: Service, tab: Open, width: int) -> None:
    page = tab(service.url, viewport={"width": width, "height": 740})
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    run(page, "Return-" + "x" * 400, n=2, max_tokens=16)
    done(page)
    page.locator("[data-token]").first.hover()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width == 360:
        sizes = page.locator("button:visible, input:visible, select:visible, summary:visible").evaluate_all(
            "all => all.map(e => (e.type === 'checkbox' ? e.parentElement : e).getBoundingClientRect())"
            ".map(box => [box.width, box.height])"
        )
        assert len(sizes) > 40
        assert min(min(size) for size in sizes) >= 44


@pytest.mark.parametrize("how", ["light", "dark", "switch"])
def test_every_text_stands_out_from_its_ground(service: Service, tab: Open, refusals: list[str], how: str) -> None:
    page = tab(service.url, color_scheme="dark" if how == "dark" else "light")
    if how == "switch":
        page.get_by_label("Colours").select_option("dark")
        page.reload()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert contrast(ground, "rgb(0, 0, 0)") > 15 if how == "light" else contrast(ground, "rgb(255, 255, 255)") > 15
    refusals.append("400")
    run(page, "Return the", max_tokens=5000)
    expect(page.get_by_role("alert")).not_to_be_empty()
    bad = _contrasts(page, page.locator("#fault, #max_tokens-wrong"))
    run(page, "Return the", max_tokens=32, temperature=1.5, seed=1)
    done(page)
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.locator("[data-token]").first.hover()
    shown = bad | _contrasts(page, page.locator("body *:visible"))
    assert len(shown) > 10
    assert {pair: ratio for pair, ratio in shown.items() if ratio < 4.5} == {}


def _contrasts(page: Page, elements: Locator) -> dict[tuple[str, str], float]:
    """Of every pair of colours that text is written in."""
    pairs = elements.evaluate_all(
        """all => all.filter(e => !e.disabled && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .map(e => {
            let under = e;
            while (under && /, 0\\)$/.test(getComputedStyle(under).backgroundColor)) under = under.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(under ?? document.body).backgroundColor];
        })"""
    )
    return {(ink, ground): contrast(ink, ground) for ink, ground in pairs}


def test_nothing_moves_for_who_wants_no_motion(server: Server, engine: FakeEngine, tab: Open) -> None:
    for wish, name in (("reduce", "none"), ("no-preference", "blink")):
        page = tab(server.url, reduced_motion=wish)
        engine.hold()
        run(page, "Tell", logprobs="")
        assert engine.submitted.acquire(timeout=DEADLINE_S)
        expect(page.locator(".text")).to_have_attribute("aria-busy", "true")
        assert page.locator(".text").evaluate("e => getComputedStyle(e, '::after').animationName") == name
        engine.answers[-1].end()
