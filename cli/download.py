"""metaseq-api-download: bring a published OPT checkpoint and its tokenizer here, ready to be served.

    metaseq-api-download opt-1.3b /data/opt/1.3b
    metaseq-api-download opt-175b /data/opt/175b --url 'https://HOST/175b/checkpoint_last_20220503/stubbed.pt?...'

Broken transfers are taken up where they broke; the same command run again fetches only what is missing.

Exit codes: 0 all is there; 130 after Ctrl-C; else the code of the error it prints in one line (errors.py).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from metaseq_api import __version__, log
from metaseq_api.download import catalogue
from metaseq_api.download.fetch import Patience
from metaseq_api.download.job import download
from metaseq_api.download.web import Web
from metaseq_api.errors import SettingsError
from metaseq_api.flags import Parser, guarded


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="metaseq-api-download",
        description="Fetch a published OPT checkpoint and its tokenizer; a broken transfer is taken up where it broke.",
        epilog=textwrap.fill(f"models: {', '.join(catalogue.RELEASES)}", break_on_hyphens=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="e.g. opt-1.3b")
    add("folder", metavar="DIR", type=Path, help="where the files go; one model per folder")
    add("--edition", choices=catalogue.EDITIONS, help="of the OPT files (default: the newest)")
    add("--url", metavar="ADDRESS", help="a mirror's folder, or the address that Meta sent, in quotes")
    add("--tokenizer-url", metavar="ADDRESS", help="a folder with gpt2-vocab.json and gpt2-merges.txt")
    add("--jobs", type=int, default=4, metavar="N", help="files at once (default: 4)")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds without a byte until a retry (default: 30)")
    add("--tries", type=int, default=8, metavar="N", help="tries in a row that may bring nothing (default: 8)")
    add("--version", action="version", version=f"metaseq-api {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what is missing, and say how to serve it; returns the exit code."""
    again = "interrupted; run the same command again to go on from here"
    return guarded("metaseq-api-download", lambda: _fetch(_parser().parse_args(argv)), again)


def _fetch(args: argparse.Namespace) -> None:
    if not args.timeout > 0 or args.tries < 1:
        raise SettingsError(f"--timeout {args.timeout:g} --tries {args.tries}; both must be more than 0")
    files = catalogue.files(args.model, edition=args.edition, url=args.url, tokenizer_url=args.tokenizer_url)
    log.setup()
    download(files, args.folder, jobs=args.jobs, web=Web(args.timeout), patience=Patience(tries=args.tries))
    print(f"{args.model} is in {args.folder}; serve it with\nmetaseq-api-local {shlex.quote(str(args.folder))}")


if __name__ == "__main__":
    sys.exit(main())
