"""A stop string ends a text wherever it is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metaseq_api.scheduling.stopping import StopChecker


def feed(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    checker = StopChecker(stop)
    ended = any(checker.push(p) for p in pieces)
    return checker.text, ended


def test_a_stop_string_over_three_pieces_is_found_and_removed() -> None:
    assert feed(("\n\nHuman:",), ["Hi.\n", "\nHum", "an: you"]) == ("Hi.", True)


def test_of_two_in_one_piece_the_earlier_counts() -> None:
    assert feed(("b", "ab"), ["xxab"]) == ("xx", True)


def test_text_before_min_tokens_is_not_searched_again() -> None:
    checker = StopChecker(("end",))
    assert not checker.push("the end", check=False)
    assert not checker.push(" of it")
    assert checker.push(" end")
    assert checker.text == "the end of it "


def test_a_forbidden_match_stays_forbidden_beside_a_longer_stop_string() -> None:
    checker = StopChecker(("ab", "abcdefgh"))
    assert not checker.push("xxab", check=False)
    assert not checker.push("y")
    assert checker.push("ab")
    assert checker.text == "xxaby"


def test_a_match_that_only_began_while_forbidden_counts() -> None:
    checker = StopChecker(("end",))
    assert not checker.push("the en", check=False)
    assert checker.push("d")
    assert checker.text == "the "


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_pieces_do_not_matter(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    got, ended = feed(tuple(stop), pieces)
    # a stop string is found as soon as it is complete: the shortest prefix of the text that holds one decides
    first = next((i for i in range(len(text) + 1) if any(s in text[:i] for s in stop)), None)
    assert ended is (first is not None)
    if first is None:
        assert got == text
    else:
        assert not any(s in got for s in stop)
        assert text.startswith(got)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_a_stream_may_send_is_never_taken_back(text: str, stop: list[str]) -> None:
    checker = StopChecker(tuple(stop))
    sent = 0
    for c in text:
        ended = checker.push(c)
        assert len(checker.text) >= sent
        if ended:
            return
        sent = max(sent, checker.num_safe)


def test_a_stop_string_that_is_to_stay_ends_the_text_behind_it() -> None:
    checker = StopChecker(("END", "\n\n"), include=True)
    assert not checker.push("some E")
    assert checker.num_safe == 6  # no later piece can take it back
    assert checker.push("ND and more\n\n")
    assert checker.text == "some END"


def test_of_two_that_begin_together_the_shorter_ends_the_text() -> None:
    checker = StopChecker(("abc", "ab", "bc"), include=True)
    assert checker.push("xxabcd")
    assert checker.text == "xxab"
