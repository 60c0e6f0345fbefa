"""metaseq-api-interactive: type a prompt, read the continuation as it comes, turn the knobs, try again.

    metaseq-api-interactive [CHECKPOINT | --url http://host:port] [--max-tokens N] [--temperature X] ...

Ctrl-C stops a continuation, Ctrl-D ends. Exit codes: 0; else the code of the error it prints in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from metaseq_api import __version__, asking
from metaseq_api.asking import Source
from metaseq_api.errors import EngineStopped, MetaseqApiError, RequestError, SettingsError
from metaseq_api.flags import Parser

HELP = '''\
type a prompt; """ alone on a line begins one of several lines and ends it
/set              the fields as they are        /set NAME VALUE   e.g. /set temperature 0.7, /set stop ["\\n"]
/unset NAME       back to the API's default     /again            the last prompt once more
/help             this                          /quit             or Ctrl-D; Ctrl-C stops a continuation'''
MAX_TOKENS = 128
"""As many as metaseq's interactive_cli generated."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="metaseq-api-interactive",
        description="Type prompts, read continuations.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="default: constants.py's, else the demo")
    parser.add_argument("--version", action="version", version=f"metaseq-api {__version__}")
    asking.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until the input ends; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        fields = {"max_tokens": MAX_TOKENS, **asking.fields_of(args)}
        source = asking.open_source(args)
        try:
            return Talk(source, fields).run()
        finally:
            source.close()
    except MetaseqApiError as e:
        _complain(e)
        return e.exit_code
    except KeyboardInterrupt:
        return 130


class Talk:
    """One conversation: the fields as they stand, and the last prompt."""

    def __init__(self, source: Source, fields: dict[str, Any]) -> None:
        self._source, self._fields = source, fields
        self._last: str | None = None
        self._person = sys.stdin.isatty()
        if self._person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then knows the arrows and what was typed before
            print("/help tells what can be typed")

    def run(self) -> int:
        """Raises: MetaseqApiError where nothing more can be answered."""
        while True:
            try:
                typed = self._read()
                if typed == "/quit":
                    return 0
                self._answer(typed)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print()
            except EngineStopped:
                raise
            except (RequestError, SettingsError) as e:
                _complain(e)

    def _read(self) -> str:
        typed = input("> " if self._person else "")
        if typed.strip() != '"""':
            return typed
        lines = []
        while (line := input(". " if self._person else "")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines) if lines else ""

    def _answer(self, typed: str) -> None:
        word, _, rest = typed.partition(" ")
        if not typed:
            return
        if not typed.startswith("/"):
            self._continue(typed)
        elif word == "/set":
            self._set(rest.strip())
        elif word == "/unset":
            self._fields.pop(rest.strip(), None)
        elif word == "/again" and self._last is not None:
            self._continue(self._last)
        elif word == "/again":
            raise SettingsError("there is no last prompt yet; type one")
        elif word == "/help":
            print(HELP)
        else:
            raise SettingsError(f"{word} is no command; /help lists them")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if value:
            self._fields[name] = asking.value_of(value)
            return
        for field, held in self._fields.items():
            if name in ("", field):
                print(f"{field} {json.dumps(held)}")

    def _continue(self, prompt: str) -> None:
        self._last = prompt
        if self._fields.get("n", 1) == 1 and self._fields.get("best_of", 1) == 1:
            for chunk in self._source.stream({**self._fields, "prompt": prompt}):
                for choice in chunk["choices"]:
                    print(choice["text"], end="", flush=True)
            print()
            return
        for choice in self._source.complete({**self._fields, "prompt": prompt})["choices"]:
            print(f"[{choice['index']}]{choice['text']}")


def _complain(error: MetaseqApiError) -> None:
    print(f"metaseq-api-interactive: error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
