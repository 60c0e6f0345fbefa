"""metaseq-api-keys: the API keys that a service asks for. A key is shown once; its file holds hashes alone.

    metaseq-api-keys --keys keys.jsonl add alice --weight 10 --rate 60 --tokens 100000 --expires 2030-01-31
    metaseq-api-keys --keys keys.jsonl list
    metaseq-api-keys --keys keys.jsonl remove alice

A running service (metaseq-api-local --keys keys.jsonl) follows the file within a second or two.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from metaseq_api import log
from metaseq_api.errors import SettingsError
from metaseq_api.flags import Parser, count, guarded
from metaseq_api.server.key_file import (
    Key,
    change_keys,
    make_key,
    new_secret,
    read_date,
    read_keys,
    write_secret,
)
from metaseq_api.settings import find_constants, read_constants


def _parser() -> Parser:
    parser = Parser(prog="metaseq-api-keys", description="The API keys that a service asks for.")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="default: KEYS_FILE of constants.py")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and show it this once", description="Make a key.")
    add.add_argument("name", help="whose key it is; shown in the log")
    add.add_argument("--weight", type=float, default=1.0, help="share beside other keys (default: 1)")
    add.add_argument("--rate", type=count, metavar="N", help="requests a minute (default: no limit)")
    add.add_argument("--tokens", type=count, metavar="N", help="tokens of prompts and completions a minute")
    add.add_argument("--concurrency", type=count, metavar="N", help="requests in work at once")
    add.add_argument("--expires", metavar="DATE", help="such as 2030-01-31, UTC (default: never)")
    add.add_argument(
        "--out", type=Path, metavar="FILE", help="write the key there, for you alone to read; show nothing"
    )
    commands.add_parser("list", help="names, shares and limits", description="List keys.")
    remove = commands.add_parser("remove", help="let a key in no more", description="Remove a key.")
    remove.add_argument("name")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Change or show a file of keys; returns the exit code."""
    log.setup()
    return guarded("metaseq-api-keys", lambda: _do(_parser().parse_args(argv)))


def _do(args: argparse.Namespace) -> None:
    path = args.keys or _configured()
    if args.command == "add":
        _add(path, args)
    elif args.command == "remove":
        _remove(path, args.name)
    else:
        _list(path)


def _configured() -> Path:
    constants = find_constants(None, Path.cwd())
    found = read_constants(constants)[0].get("keys_file") if constants else None
    if not isinstance(found, Path):
        raise SettingsError("no file of keys was named; pass --keys FILE, or set KEYS_FILE in constants.py")
    return found


def _add(path: Path, args: argparse.Namespace) -> None:
    expires = None if args.expires is None else read_date(args.expires, "--expires")
    if expires is not None and expires <= time.time():
        raise SettingsError(f"--expires {args.expires} is over already; name a day to come, or leave it out")
    secret = new_secret()
    key = make_key(
        args.name,
        secret,
        weight=args.weight,
        requests_per_minute=args.rate,
        tokens_per_minute=args.tokens,
        concurrency=args.concurrency,
        expires=expires,
    )

    def added(keys: tuple[Key, ...]) -> list[Key]:
        if any(k.name == key.name for k in keys):
            raise SettingsError(f"{path} has a key named {key.name} already; remove it first, or choose another name")
        if args.out is not None:  # before the key counts: where it cannot be written it is not added
            write_secret(args.out, secret)
        return [*keys, key]

    change_keys(path, added)
    if args.out is None:
        print(f"the key of {key.name}, shown this once:", file=sys.stderr)
        print(secret)


def _remove(path: Path, name: str) -> None:
    def removed(keys: tuple[Key, ...]) -> list[Key]:
        left = [k for k in keys if k.name != name]
        if len(left) == len(keys):
            raise SettingsError(f"{path} has no key named {name}; `list` shows the names")
        return left

    change_keys(path, removed)


def _list(path: Path) -> None:
    def shown(limit: object) -> str:
        return "-" if limit is None else str(limit)

    keys = read_keys(path)[0]
    columns = "{:<20} {:>8} {:>12} {:>12} {:>8}  {}"
    print(columns.format("name", "weight", "requests/min", "tokens/min", "at once", "expires"))
    for k in keys:
        ends = "-"
        if k.expires is not None:
            moment = datetime.fromtimestamp(k.expires, timezone.utc).isoformat(timespec="seconds")
            ends = moment + (" (over)" if k.expires <= time.time() else "")
        limits = (shown(k.requests_per_minute), shown(k.tokens_per_minute), shown(k.concurrency))
        print(columns.format(k.name, f"{k.weight:g}", *limits, ends))


if __name__ == "__main__":
    sys.exit(main())
