"""The flags of metaseq-api-bench, each job's its own. Knows what may be said. Does not know what is done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from metaseq_api.bench.load import LAYOUTS
from metaseq_api.bench.rivals import NAMES, US
from metaseq_api.bench.work import LONGEST, SHORTEST
from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.flags import Parser, count
from metaseq_api.settings import DTYPES


def parser(description: str | None) -> Parser:
    """Of the whole command; `args.kind` is the job's name."""
    top = Parser(
        prog="metaseq-api-bench", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = top.add_subparsers(dest="kind", required=True, metavar="JOB", help="each has --help")
    for name, (add, says) in JOBS.items():
        add(kinds.add_parser(name, help=says, description=says))
    return top


def _latency(p: Parser) -> None:
    _subject(p, "opt-125m")
    _against(p)
    p.add_argument("--prompt-len", type=count, default=128, help="tokens before those that are timed (default: 128)")
    p.add_argument("--new-tokens", type=_several, default=128, help="tokens of an answer (default: 128)")
    p.add_argument("--prefill-len", type=count, default=1024, help="tokens of the long prompt (default: 1024)")
    _kept(p)


def _throughput(p: Parser) -> None:
    _subject(p, "opt-125m")
    _against(p)
    p.add_argument("--requests", type=count, nargs="+", default=[32], metavar="N", help="at once (default: 32)")
    p.add_argument("--temperature", type=_heat, default=0.0, metavar="T", help="of every request (default: 0, greedy)")
    p.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="with a temperature (default: 1)")
    _lengths(p)
    _kept(p, plot=True)


def _serve(p: Parser) -> None:
    _subject(p, "opt-125m")
    p.add_argument("--model-parallel", type=count, metavar="N", help="ranks of a service that is started here")
    p.add_argument("--url", help="a running server instead, http://host:port; its key is taken from $METASEQ_API_KEY")
    p.add_argument("--model", help="its model's name, where it wants one")
    sweep = p.add_mutually_exclusive_group()
    sweep.add_argument("--concurrency", type=count, nargs="+", metavar="N", help="streams at once (default: 1 4 16)")
    sweep.add_argument("--rate", type=_rate, nargs="+", metavar="R", help="requests a second, at random times")
    p.add_argument("--requests", type=count, metavar="N", help="of each level (default: 4 a stream; 30 s at a rate)")
    p.add_argument("--ttft-ms", type=_above_0, default=1000.0, help="limit of the goodput (default: 1000)")
    p.add_argument("--tpot-ms", type=_above_0, default=100.0, help="limit of the goodput (default: 100)")
    p.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")
    _lengths(p)
    _kept(p, plot=True)


def _startup(p: Parser) -> None:
    _subject(p, None)
    p.add_argument("--model-parallel", type=count, metavar="N", help="ranks")
    p.add_argument("--starts", type=count, default=3, metavar="N", help="one after the other (default: 3)")
    _kept(p)


def _http(p: Parser) -> None:
    _subject(p, None)
    p.add_argument("--rounds", type=count, default=3, help="how often the sides take turns (default: 3)")
    p.add_argument("--streams", type=count, default=256, help="at once (default: 256)")
    p.add_argument("--new-tokens", type=_several, default=200, help="of each stream (default: 200)")
    p.add_argument("--connections", type=count, default=64, help="for requests of one token (default: 64)")
    p.add_argument("--requests", type=count, default=40, help="of each connection (default: 40)")
    _kept(p)


def _reshard(p: Parser) -> None:
    p.add_argument("--shape", choices=OPT_SHAPES, default="opt-1.3b", help="default: %(default)s")
    p.add_argument("--shards", type=count, default=8, help="default: %(default)s")
    p.add_argument("--rounds", type=count, default=3, help="default: %(default)s")
    p.add_argument(
        "--folder", type=Path, required=True, help="where 17 bytes a parameter are free; files are kept there"
    )
    _kept(p)


def _load(p: Parser) -> None:
    p.add_argument("--shape", choices=OPT_SHAPES, default="opt-1.3b", help="default: %(default)s")
    p.add_argument("--layouts", choices=sorted(LAYOUTS), nargs="+", default=list(LAYOUTS), help="default: all")
    p.add_argument("--ranks", type=count, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="of what is computed (default: fp32)")
    p.add_argument("--rounds", type=count, default=3, help="default: %(default)s")
    p.add_argument(
        "--folder", type=Path, required=True, help="where 6 bytes a parameter are free; files are kept there"
    )
    _kept(p)


def _rivals(p: Parser) -> None:
    p.add_argument("--harness", type=Path, required=True, metavar="DIR", help="adapters, workload.py and run_peers.py")
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="its models and environments")
    p.add_argument("--shape", choices=("opt-125m", "opt-1.3b"), default="opt-125m", help="default: opt-125m")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="default: bf16")
    known = sorted(NAMES.keys() - {US})
    p.add_argument("--rivals", choices=known, nargs="+", default=["ov", "vllm", "hf"], help="default: ov vllm hf")
    p.add_argument("--serving", choices=["vllm"], nargs="*", default=[], help="asked through HTTP too (default: none)")
    p.add_argument("--rounds", type=count, default=3, help="of three, two and one turns (default: 3)")
    _kept(p)


def _page(p: Parser) -> None:
    p.add_argument("runs", type=Path, help="folder of the files that --json wrote")
    p.add_argument("page", type=Path, help="Markdown with marks: <!-- run NAME --> and <!-- end -->")


JOBS = {
    "latency": (_latency, "one stream: first token, each token after it, share of the bandwidth"),
    "throughput": (_throughput, "many requests at once, without HTTP"),
    "serve": (_serve, "through HTTP: percentiles and goodput by concurrency or request rate"),
    "startup": (_startup, "from the command to the first token, and where that goes"),
    "http": (_http, "what the front end costs, beside the engine alone"),
    "reshard": (_reshard, "joining FSDP shards, beside cp and beside loading everything"),
    "load": (_load, "reading a checkpoint to serve it, beside a plain read of the same bytes"),
    "rivals": (_rivals, "other servers on the same work in turns, by a harness that runs them"),
    "page": (_page, "write kept runs into the tables of a page"),
}


def _subject(p: Parser, shape: str | None) -> None:
    """`shape` None: the embedded demo is measured where nothing is named."""
    which = p.add_mutually_exclusive_group()
    default = f"default: {shape or 'the embedded demo'}"
    which.add_argument("--shape", choices=OPT_SHAPES, help=f"random weights, made on the device ({default})")
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="real weights, in any layout that is served")
    p.set_defaults(otherwise=shape)
    p.add_argument("--dtype", choices=DTYPES, help="default: as stored on a GPU, fp32 on a CPU")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    p.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: one for each core)")


def _against(p: Parser) -> None:
    p.add_argument(
        "--against", choices=["none", "hf"], default="none", help="Hugging Face's generate, in turns with ours"
    )
    p.add_argument("--ranks", type=_several, metavar="N", help="also split over so many, which share the threads")
    p.add_argument("--rounds", type=count, default=3, help="of which the median is shown (default: 3)")


def _lengths(p: Parser) -> None:
    p.add_argument("--new-tokens", type=_several, default=128, help="tokens of each answer (default: 128)")
    p.add_argument("--shortest", type=count, default=SHORTEST, help=f"tokens of a prompt (default: {SHORTEST})")
    p.add_argument("--longest", type=count, default=LONGEST, help=f"tokens of a prompt (default: {LONGEST})")


def _kept(p: Parser, *, plot: bool = False) -> None:
    p.add_argument("--json", type=Path, metavar="FILE", help="keep all figures here")
    if plot:
        p.add_argument("--plot", type=_svg, metavar="FILE.svg", help="throughput against latency, with the roofline")


def _several(text: str) -> int:
    if count(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is too few; ask for 2 or more")
    return int(text)


def _number(least: float, most: float, says: str) -> Callable[[str], float]:
    """Reads a number above `least` and up to `most`; argparse is told what it is not."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least < number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {says}")
        return number

    return read


_above_0 = _number(0, 1e9, "a number above 0")
_rate = _number(0, 1e6, "a number of requests a second")
_share = _number(0, 1, "a number above 0, of at most 1")
_heat = _number(-1e-9, 100, "a temperature from 0 to 100")


def _svg(text: str) -> Path:
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg, which is what is drawn; any browser shows it")
    return Path(text)
