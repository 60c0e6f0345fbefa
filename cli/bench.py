"""metaseq-api-bench: what is measured, each beside another way of doing the same in the same run.

    metaseq-api-bench latency --shape opt-125m --dtype bf16 --against hf    one stream, and the share of the bandwidth
    metaseq-api-bench throughput --shape opt-13b --requests 1 8 64 256      many at once, without HTTP
    metaseq-api-bench serve --shape opt-125m --concurrency 1 4 16           through HTTP; or --rate 0.5 1, or --url URL
    metaseq-api-bench startup --checkpoint /data/opt/1.3b                   from the command to the first token
    metaseq-api-bench http                                                  what the front end costs
    metaseq-api-bench reshard --folder /scratch/bench                       joining FSDP shards, beside cp
    metaseq-api-bench load --folder /scratch/bench-load                     reading to serve, beside a plain read
    metaseq-api-bench rivals --harness peers --work peers-work              OpenVINO, vLLM, CTranslate2, Hugging Face
    metaseq-api-bench page run/bench docs/performance.md                    kept runs into the page's tables

Random weights of --shape are made on the device; --checkpoint DIR measures real ones. A table goes to the terminal, all
figures to --json FILE, throughput against latency with the roofline to --plot FILE.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence

from metaseq_api.bench import flags, jobs, report
from metaseq_api.bench.figures import as_text
from metaseq_api.bench.plot import svg
from metaseq_api.flags import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and keep the figures where --json says."""
    argv = sys.argv[1:] if argv is None else argv
    with ending_as_by_ctrl_c():
        return guarded("metaseq-api-bench", lambda: job(argv))


@contextlib.contextmanager
def ending_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they would end this process alone, end what it started too."""
    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for s in heard:
        signal.signal(s, signal.default_int_handler)
    try:
        yield
    finally:
        for s in heard:
            signal.signal(s, signal.SIG_DFL)


def job(argv: Sequence[str]) -> None:
    """What the flags say. Raises: MetaseqApiError."""
    args = flags.parser(__doc__).parse_args(argv)
    if args.kind == "page":
        write_page(args)
    else:
        measure(args, argv)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def measure(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """One job, from its flags to what is shown and kept."""
    plot = getattr(args, "plot", None)
    for path, flag in ((args.json, "--json"), (plot, "--plot")):
        if path:
            report.check_place(path, flag)
    found = jobs.JOBS[args.kind](args, say)
    kept = report.make(argv, found.lines, found.figures, headline=found.headline)
    print("\n".join(line for line in (found.headline, f"{kept['machine']}; commit {kept['commit']}") if line))
    print(as_text(found.lines))
    if args.json:
        report.write(json.dumps(kept, indent=1) + "\n", args.json)
    if plot and found.curves:
        report.write(svg(kept["command"], found.curves, found.roofline), plot)


def write_page(args: argparse.Namespace) -> None:
    """Tables of the page anew, from the runs that were kept."""
    runs = report.read_runs(args.runs)
    report.write(report.fill(report.read_page(args.page), runs), args.page)


if __name__ == "__main__":
    sys.exit(main())
