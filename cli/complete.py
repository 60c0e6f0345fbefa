"""metaseq-api-complete: continue a prompt, or a file of them, and write what comes.

    metaseq-api-complete "Paris is" --checkpoint /data/opt/1.3b --max-tokens 32     a checkpoint, loaded for this
    echo "Paris is" | metaseq-api-complete --url http://node7:6010 --stream         a running server
    metaseq-api-complete --file asks.jsonl > answers.jsonl                          a line each: {"prompt": ..., "n": 2}

The prompt is the argument, else --file, else standard input (without its last newline). In JSON lines each line is an
object of the API's fields, or a string alone; flags hold where a line says nothing. Answers come in the lines' order,
each as soon as those before it are written. A line that is refused gives {"error": ...} in its place.

Exit codes: 0; 1 where something was refused; 130 after Ctrl-C; else the code of the error it prints in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metaseq_api import __version__, asking
from metaseq_api.asking import Source
from metaseq_api.errors import (
    EngineStopped,
    MetaseqApiError,
    NotAuthorized,
    NotFound,
    Overloaded,
    RequestError,
    SettingsError,
)
from metaseq_api.flags import Parser
from metaseq_api.server.schema import render_error

Question = dict[str, Any] | RequestError
"""A body to ask, or why a line is none; and so is an answer."""
AT_ONCE = 32
_NOT_OF_ONE_LINE = (EngineStopped, NotAuthorized, NotFound, Overloaded)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="metaseq-api-complete", description="Continue a prompt, or a file of prompts.", allow_abbrev=False
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="default: --file, else standard input")
    add("--checkpoint", metavar="DIR", help="a checkpoint to load (default: constants.py's, else the demo)")
    add(
        "--file",
        metavar="FILE",
        help="one prompt; in a .jsonl file a prompt or an object of fields a line; - is standard input",
    )
    add("--jsonl", action="store_true", help="the input is JSON lines, whatever it is called")
    add("--json", action="store_true", help="write answers as JSON lines (as for JSON lines read)")
    add("--stream", action="store_true", help="write the text as it comes; with --json the API's chunks")
    add("--at-once", type=int, default=AT_ONCE, metavar="N", help=f"questions in work at a time (default: {AT_ONCE})")
    add("--version", action="version", version=f"metaseq-api {__version__}")
    asking.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer all that is asked; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        jsonl = args.jsonl or (args.file or "").endswith((".jsonl", ".ndjson"))
        asked = _questions(args, asking.fields_of(args), jsonl)
        source = asking.open_source(args)
        try:
            return _run(args, source, asked, as_json=args.json or jsonl)
        finally:
            source.close()
    except MetaseqApiError as e:
        print(f"metaseq-api-complete: error: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _questions(args: argparse.Namespace, fields: dict[str, Any], jsonl: bool) -> Iterator[Question]:
    """All that is to be asked, in order. Raises: SettingsError."""
    if args.prompt is not None and (args.file is not None or jsonl):
        raise SettingsError("a prompt and --file or --jsonl are given; give one of them")
    if args.stream and not args.json and not jsonl and fields.get("n", 1) != 1:
        raise SettingsError("--stream writes one text as it comes; leave --n out, or take --json")
    if args.at_once < 1:
        raise SettingsError(f"--at-once is {args.at_once}; it must be 1 or more")
    if args.prompt is not None:
        return iter([{**fields, "prompt": args.prompt}])
    fd = _open(args.file)
    if jsonl:
        return (_question(line, fields) for line in _lines(fd) if line.strip())
    raw = b"".join(line + b"\n" for line in _lines(fd))
    return iter([{**fields, "prompt": _text(raw).removesuffix("\n")}])


def _open(file: str | None) -> int:
    if file in (None, "-"):
        return 0
    try:
        return os.open(Path(file or ""), os.O_RDONLY)
    except OSError as e:
        raise SettingsError(f"--file {file}: {e.strerror}") from None


def _lines(fd: int) -> Iterator[bytes]:
    """Read without Python's buffers, whose locks a thread that waits for input would hold to the end."""
    rest = b""
    while data := os.read(fd, 1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SettingsError(f"the prompt is not UTF-8 at byte {e.start}; convert it first") from None


def _question(line: bytes, fields: dict[str, Any]) -> Question:
    try:
        found = json.loads(line)
    except ValueError as e:
        return RequestError(f"the line is not JSON ({e})", code="invalid_json")
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, dict):
        return RequestError("the line must be an object of fields, or a string", code="invalid_json")
    return {**fields, **found}


def _run(args: argparse.Namespace, source: Source, asked: Iterator[Question], *, as_json: bool) -> int:
    if args.stream:
        return _stream(source, asked, as_json=as_json)
    num = num_refused = 0

    def answer(question: Question) -> Question:
        try:
            return question if isinstance(question, RequestError) else source.complete(question)
        except _NOT_OF_ONE_LINE:
            raise
        except RequestError as e:
            return e

    for found in asking.in_order(asked, answer, args.at_once):
        num += 1
        num_refused += isinstance(found, RequestError)
        if as_json:
            _write(json.dumps(render_error(found) if isinstance(found, RequestError) else found) + "\n")
        elif isinstance(found, RequestError):
            raise found
        else:
            for choice in found["choices"]:
                _write(choice["text"].removesuffix("\n") + "\n")
    return _verdict(num, num_refused)


def _stream(source: Source, asked: Iterator[Question], *, as_json: bool) -> int:
    num = num_refused = 0
    for question in asked:
        num += 1
        try:
            if isinstance(question, RequestError):
                raise question
            last = "\n"
            for chunk in source.stream(question):
                texts = [choice["text"] for choice in chunk["choices"]]
                _write(json.dumps(chunk) + "\n" if as_json else "".join(texts))
                last = ("".join(texts) or last)[-1]
            if not as_json and last != "\n":
                _write("\n")
        except RequestError as e:
            if not as_json or isinstance(e, _NOT_OF_ONE_LINE):
                raise
            num_refused += 1
            _write(json.dumps(render_error(e)) + "\n")
    return _verdict(num, num_refused)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _verdict(num: int, num_refused: int) -> int:
    if num_refused:
        print(
            f"metaseq-api-complete: error: {num_refused} of {num} lines were refused; their answers say why",
            file=sys.stderr,
        )
    return 1 if num_refused else 0


if __name__ == "__main__":
    sys.exit(main())
