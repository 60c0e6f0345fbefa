"""What a person sees while and after the page asks: streams, samples, probabilities, errors."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect
from support.browser import Open, done, run, texts
from support.fake_engine import FakeEngine
from support.processes import DEADLINE_S, until
from support.service import Service

from metaseq_api.errors import DeadlineExceeded, EngineStopped
from metaseq_api.server.run import Server


def test_a_script_that_gets_into_the_page_does_not_run(server: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    page.context.close()


# streaming


def test_text_appears_as_it_comes_and_is_read_aloud_once(server: Server, engine: FakeEngine, tab: Open) -> None:
    page = tab(server.url)
    engine.hold()
    run(page, "Tell", logprobs="")
    assert engine.submitted.acquire(timeout=DEADLINE_S)
    for part, so_far in (("one ", "one "), ("two ", "one two "), ("<b>", "one two <b>")):
        engine.answers[-1].say(part)
        expect(page.locator(".text")).to_have_text(f"Tell{so_far}", use_inner_text=True)
        expect(page.locator(".text")).to_have_attribute("aria-busy", "true")
        expect(page.locator("#heard")).to_be_empty()
    engine.answers[-1].end()
    expect(page.locator("#heard")).to_have_text("Done: one two <b>")
    expect(page.locator(".text")).not_to_have_attribute("aria-busy", "true")
    assert page.locator("#heard").get_attribute("role") == "status"


def test_events_are_read_however_their_bytes_are_cut(server: Server, tab: Open) -> None:
    page = tab(server.url)
    sent = 'data: {"é": "😀"}\n\n: a comment\r\nevent: x\r\ndata:a\r\ndata: b\r\n\r\ndata: c\r\rdata: cut short'
    for size in (1, 2, 3, 7, 1000):
        got = page.evaluate(
            """async ([text, size]) => {
                const bytes = new TextEncoder().encode(text), out = [];
                const stream = new ReadableStream({ start(to) {
                    for (let i = 0; i < bytes.length; i += size) to.enqueue(bytes.slice(i, i + size));
                    to.close();
                } });
                for await (const data of events(stream)) out.push(data);
                return out;
            }""",
            [sent, size],
        )
        assert got == ['{"é": "😀"}', "a\nb", "c"], size


def test_tokens_that_share_a_character_are_one_piece(server: Server, tab: Open) -> None:
    page = tab(server.url)
    pieces = page.evaluate(
        r"""() => {
            const sample = new Sample(0, 1, "😀"), part = (text, tokens, offsets) => sample.add({ text,
                logprobs: { tokens, text_offset: offsets, token_logprobs: tokens.map(() => -0.1) } });
            part("a", ["a"], [1]);
            part("", ["bytes:\\xf0\\x9f"], [2]);
            part("😀b", ["bytes:\\x98\\x80", "b"], [2, 3]);
            part("!?", ["!?"], [4]);
            return sample.pieces.map(p => [p.span.textContent, p.tokens.length]);
        }"""
    )
    assert pieces == [["a", 1], ["😀", 2], ["b", 1], ["!?", 1]]


def test_an_error_within_a_stream_is_told_and_what_came_stays(server: Server, engine: FakeEngine, tab: Open) -> None:
    page = tab(server.url)
    engine.hold()
    run(page, "Tell", logprobs="")
    assert engine.submitted.acquire(timeout=DEADLINE_S)
    engine.answers[-1].say("half")
    engine.answers[-1].end(EngineStopped("a rank was lost"))
    expect(page.get_by_role("alert")).to_have_text("a rank was lost")
    expect(page.locator(".text")).to_have_text("Tellhalf")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_frees_the_request(service: Service, tab: Open, how: str) -> None:
    page = tab(service.url)
    run(page, "Return the", n=8, max_tokens=480, min_tokens=480)
    until(lambda: service.running == 8, "eight samples to run")
    expect(page.locator(".text").first).not_to_be_empty()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#say")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    until(lambda: service.running == 0, "the request to be freed", 5)
    assert page.locator("article footer").all_inner_texts() == [""] * 8, "none had ended by itself"
    expect(page.locator("#service")).to_contain_text("0 running")


def test_a_second_run_ends_the_first(server: Server, engine: FakeEngine, tab: Open) -> None:
    page = tab(server.url)
    engine.hold()
    run(page, "One", logprobs="")
    assert engine.submitted.acquire(timeout=DEADLINE_S)
    run(page, "Two")
    assert engine.submitted.acquire(timeout=DEADLINE_S)
    assert engine.answers[0].cancelled.wait(DEADLINE_S)
    engine.answers[1].say("!")
    expect(page.locator(".text")).to_have_text("Two!")
    engine.answers[1].end()


# what one sees


def test_samples_stand_side_by_side(service: Service, tab: Open) -> None:
    page = tab(service.url)
    run(page, "Return the", n=3, max_tokens=12, seed=5)
    done(page)
    boxes = [article.bounding_box() for article in page.locator("article").all()]
    assert len(boxes) == 3
    assert all(boxes)
    assert len({round(box["y"]) for box in boxes if box}) == 1
    want = service.texts(prompt="Return the", n=3, max_tokens=12, seed=5, temperature=0.7, top_p=0.9)
    assert texts(page) == want


def test_alternatives_show_on_hover_and_one_can_be_taken(service: Service, tab: Open) -> None:
    page = tab(service.url)
    run(page, "Return the", max_tokens=8, temperature=0)
    done(page)
    alternatives = page.get_by_role("group", name="Alternatives of a token")
    expect(alternatives).to_be_hidden()
    token = page.locator("[data-token]").nth(1)
    token.hover()
    expect(alternatives).to_be_visible()
    expect(alternatives.get_by_role("listitem")).to_have_count(5)
    expect(alternatives.locator("p")).to_have_text(re.compile(rf"^“{re.escape(token.text_content() or '')}” [\d.]+ %$"))
    asked = service.complete(prompt="Return the", max_tokens=2, temperature=0, logprobs=5)["choices"][0]["logprobs"]
    other = sorted(asked["top_logprobs"][1], key=asked["top_logprobs"][1].__getitem__)[-2]
    alternatives.get_by_role("button").first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(f"Return the{asked['tokens'][0]}{other}")
    done(page)
    page.mouse.move(0, 0)
    expect(alternatives).to_be_hidden()


def test_a_new_line_can_be_pointed_at_and_is_not_copied(service: Service, tab: Open) -> None:
    page = tab(service.url)
    run(page, "Return the", max_tokens=24, temperature=0)
    done(page)
    line = page.locator("[data-token].break").first
    line.hover()
    alternatives = page.get_by_role("group", name="Alternatives of a token")
    expect(alternatives.locator("p")).to_contain_text("“⏎")
    assert "⏎" not in page.locator(".text").inner_text()
    assert "⏎" not in page.locator(".text").aria_snapshot()


def test_alternatives_show_on_a_tap(service: Service, tab: Open) -> None:
    page = tab(service.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.locator("#settings > summary").tap()
    run(page, "Return the", max_tokens=200, min_tokens=200, temperature=0)
    done(page)
    page.locator("[data-token]").nth(1).tap()
    sheet = page.get_by_role("group", name="Alternatives of a token")
    expect(sheet).to_be_visible()
    box = sheet.bounding_box()
    assert box
    assert box["x"] == 0
    assert box["y"] + box["height"] == pytest.approx(740, abs=1)
    page.locator("h1").tap()
    expect(sheet).to_be_hidden()
    page.locator("[data-token]").last.tap()
    token, box = page.locator(".here").bounding_box(), sheet.bounding_box()
    assert token
    assert box
    assert token["y"] + token["height"] <= box["y"], "the sheet hides the token that it tells of"


def test_tokens_are_tinted_by_their_probability_and_the_tint_can_be_taken_off(service: Service, tab: Open) -> None:
    page = tab(service.url)
    run(page, "Return the", max_tokens=24, temperature=1.5, seed=1)
    done(page)
    unlikely = page.locator("#columns .p4").first
    assert unlikely.evaluate("e => getComputedStyle(e).backgroundColor") != "rgba(0, 0, 0, 0)"
    page.get_by_label("Tint by probability").uncheck()
    assert unlikely.evaluate("e => getComputedStyle(e).backgroundColor") == "rgba(0, 0, 0, 0)"


def test_a_text_without_probabilities_is_shown_too(service: Service, tab: Open) -> None:
    page = tab(service.url)
    run(page, "Return the", max_tokens=8, temperature=0, logprobs="")
    done(page)
    assert texts(page) == service.texts(prompt="Return the", max_tokens=8, temperature=0, top_p=0.9)


def test_the_status_says_model_window_and_load(
    server: Server, engine: FakeEngine, tab: Open, refusals: list[str]
) -> None:
    page = tab(server.url)
    expect(page.locator("#service")).to_have_text("fake · window 512 tokens · 0 running, 0 waiting")
    refusals.append("503")
    engine.stopped = "a rank was lost"
    run(page, "Hello")
    expect(page.locator("#service")).to_have_text("not answering: a rank was lost")
    expect(page.locator("#service")).to_have_class("down")
    expect(page.get_by_role("alert")).to_contain_text("a rank was lost")


# errors


@pytest.mark.parametrize(
    ("field", "value", "words", "statuses"),
    [
        ("temperature", "101", "temperature is 101; it must be a number from 0 to 100", []),
        ("min_tokens", "65", "min_tokens is 65; it must be between 0 and max_tokens (64)", ["400"]),
        ("max_tokens", "5000", "max_tokens is 5000, but prompt and the leading </s> take 2 of", ["400"]),
        ("n", "17", "n is 17; it must be at most 16, this server's MAX_BEAM", ["400"]),
        ("alpha_presence", "-1", "alpha_presence is -1", ["400"]),
    ],
)
def test_a_bad_value_is_told_beside_its_field(
    service: Service, tab: Open, refusals: list[str], field: str, value: str, words: str, statuses: list[str]
) -> None:
    refusals += statuses
    page = tab(service.url)
    run(page, "Return", **{field: value})
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(page.locator(f"#{field}")).to_be_focused()
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(f"#{field}-wrong")).to_contain_text(words)
    page.locator(f"#{field}").fill("1")
    page.keyboard.press("Control+Enter")
    done(page)
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_a_server_that_does_not_answer_is_told(server: Server, tab: Open, refusals: list[str]) -> None:
    refusals.append("net::ERR_FAILED")
    page = tab(server.url)
    page.route("**/v1/completions", lambda route: route.abort())
    run(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("The server does not answer; is it running?")


def test_a_request_whose_time_is_over_is_told_beside_what_had_come(
    server: Server, engine: FakeEngine, tab: Open
) -> None:
    engine.hold()
    page = tab(server.url)
    run(page, "Hello", logprobs="")
    assert engine.submitted.acquire(timeout=DEADLINE_S)
    answer = engine.answers[-1]
    answer.say("half of it")
    expect(page.locator("#columns")).to_contain_text("half of it")
    answer.end(DeadlineExceeded("the time for this request was over after 10 of at most 64 tokens", param="timeout_ms"))
    expect(page.get_by_role("alert")).to_contain_text(
        "the time for this request was over after 10 of at most 64 tokens"
    )
    expect(page.locator("#columns")).to_contain_text("half of it")
