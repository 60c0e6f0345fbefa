"""metaseq-api-interactive: what is typed, what is answered; on a real terminal, Ctrl-C stops a text and no more."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import clean_env, until
from support.service import Service
from support.talk import door, run

from metaseq_api.settings import DEMO

GREEDY = ["--max-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    service.kill()


@pytest.fixture(params=["here", "server"])
def source(request: pytest.FixtureRequest, service: Service) -> list[str]:
    return [str(DEMO)] if request.param == "here" else ["--url", str(service.url)]


def test_prompts_are_continued_and_knobs_turned(source: list[str], tmp_path: Path) -> None:
    typed = ["Return the", "/again", "/set max_tokens 2", "/set max_tokens", "/again", "/set n 2", "/again"]
    ran = run("interactive", *source, *GREEDY, cwd=tmp_path, given="\n".join(typed))
    text = " string of the string.\n\n"
    assert ran.stdout == text * 2 + "max_tokens 2\n" + " string of\n" + "[0] string of\n[1] string of\n"
    assert (ran.stderr, ran.returncode) == ("", 0)


def test_several_lines_are_one_prompt(source: list[str], tmp_path: Path) -> None:
    typed = '/set echo true\n"""\nReturn\n\n/the\n"""\n/quit\nnever read\n'
    ran = run("interactive", *source, *GREEDY, cwd=tmp_path, given=typed)
    assert ran.stdout.startswith("Return\n\n/the")
    assert "never" not in ran.stdout


def test_a_mistake_is_told_and_the_talk_goes_on(source: list[str], tmp_path: Path) -> None:
    typed = "/again\n/sett n 2\n/set temprature 1\nx\n/unset temprature\nReturn the\n/help\n"
    ran = run("interactive", *source, *GREEDY, cwd=tmp_path, given=typed)
    errors = ran.stderr.splitlines()
    assert all(line.startswith("metaseq-api-interactive: error: ") for line in errors)
    assert all(word in line for word, line in zip(("no last prompt", "/sett", "temperature"), errors, strict=True))
    assert ran.stdout.startswith(" string of the string.")
    assert "/unset NAME" in ran.stdout
    assert ran.returncode == 0


def test_where_nothing_can_be_answered_it_ends_in_one_line(tmp_path: Path) -> None:
    for arguments, code in ((["--url", "http://127.0.0.1:1"], 1), (["nowhere"], 3), (["--n", "x"], 2)):
        ran = run("interactive", *arguments, cwd=tmp_path, given="x\n")
        assert (ran.stdout, ran.stderr.count("\n"), ran.returncode) == ("", 1, code)


def test_on_a_terminal_ctrl_c_stops_a_text_and_ctrl_d_ends(service: Service, tmp_path: Path) -> None:
    person, terminal = pty.openpty()
    seen = bytearray()
    with subprocess.Popen(
        [*door("interactive"), "--url", str(service.url), "--max-tokens", "400", "--ignore-eos"],
        cwd=tmp_path,
        env=clean_env(TERM="dumb"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as talk:
        os.close(terminal)
        os.set_blocking(person, False)

        def shows(text: str) -> bool:
            try:
                seen.extend(os.read(person, 1 << 16))
            except (BlockingIOError, OSError):  # nothing yet; or the other end is gone
                return text.encode() in seen
            return text.encode() in seen

        until(lambda: shows("> "), "the first prompt")
        os.write(person, b"Return the\n")
        asked = b"Return the\r\n"  # as a terminal shows it
        until(lambda: shows(asked.decode()) and not seen.endswith(asked), "a text to begin")
        seen.clear()
        talk.send_signal(signal.SIGINT)
        until(lambda: shows("> "), "the next prompt")
        until(lambda: not service.running, "the text to be given up")
        os.write(person, b"\x04")
        assert talk.wait(20) == 0
    os.close(person)
