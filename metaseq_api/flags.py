"""What every door shares: flags that are refused in one line, and errors that become one line and an exit code.

Knows terminals. Does not know what a door does.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from metaseq_api.errors import MetaseqApiError, SettingsError


class Parser(argparse.ArgumentParser):
    """Refuses in one line, with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Raises: SettingsError."""
        raise SettingsError("; ".join([message, *self.hints(message), "see --help"]))

    def hints(self, message: str) -> list[str]:
        """What may be said beside argparse's own words."""
        unknown = re.findall(r"(?<!\S)--?[\w-]+", message.partition("unrecognized arguments: ")[2])
        hints = [hint for word in unknown for hint in self.hint(word)]
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hints += _meant(found[1], re.findall(r"[\w.-]+", found[2]))
        return hints

    def hint(self, flag: str) -> list[str]:
        """What may be said of a flag that is unknown."""
        return _meant(flag, list(self.flags()))

    def flags(self) -> Iterator[str]:
        """All, those of its commands too."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._option_string_actions


def _meant(word: str, known: list[str]) -> list[str]:
    near = difflib.get_close_matches(word, known, n=1)
    return [f"did you mean {near[0]}?"] if near else []


def count(text: str) -> int:
    """A number from 1 on, as argparse reads one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def guarded(prog: str, job: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run a door's job; an error the user can act on becomes one line and its exit code."""
    try:
        job()
    except MetaseqApiError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: {interrupted}", file=sys.stderr)  # noqa: T201
        return 130
    return 0
