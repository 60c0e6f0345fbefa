"""metaseq-api-bench: what is measured, each beside another way of doing the same in the same run.

    metaseq-api-bench engine --shape opt-125m --dtype bf16 --against hf
    metaseq-api-bench reshard --shape opt-1.3b --shards 8 --folder /scratch/bench
    metaseq-api-bench load --shape opt-1.3b --folder /scratch/bench-load

engine: tokens a second of random weights, beside Hugging Face's `generate`. reshard: joining FSDP shards, beside `cp`
and beside metaseq's way (load everything, join, save). load: reading a checkpoint to serve it, beside a plain read of
the same bytes. The files that reshard and load need are made in the folder first and kept there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from metaseq_api.bench import engine, load, reshard
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.door import guarded
from metaseq_api.core.config import OPT_SHAPES


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and with --json write the figures."""
    args = _parser().parse_args(argv)
    return guarded(lambda: args.job(args))


def say(text: str) -> None:
    print(text, file=sys.stderr)


def bench_engine(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sides = engine.sides(OPT_SHAPES[args.shape], DTYPES[args.dtype], device, args.against)
    asked = engine.Load(
        rounds=args.rounds,
        prompt_len=args.prompt_len,
        new_tokens=args.new_tokens,
        prefill_len=args.prefill_len,
        requests=args.requests,
    )
    figures = engine.measure(sides, asked, say)
    print(f"{args.shape} {args.dtype}, {device}, {args.threads} threads, torch {torch.__version__}")
    print("\n".join(engine.table(figures)))
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name != "job"}
        Path(args.json).write_text(json.dumps({"arguments": arguments, "figures": figures}, indent=1))


def bench_reshard(args: argparse.Namespace) -> None:
    figures = reshard.measure(args.folder, OPT_SHAPES[args.shape], args.shards, args.rounds, say)
    total = sum(path.stat().st_size for path in args.folder.glob("*shard*.pt"))
    print(f"{args.shape}, {args.shards} shards of {total / 1e9:.2f} GB in all, optimizer state left out")
    print("\n".join(reshard.table(figures)))


def bench_load(args: argparse.Namespace) -> None:
    files = load.make(args.folder, OPT_SHAPES[args.shape], say)
    files = {layout: files[layout] for layout in args.layouts}
    figures = load.measure(files, args.ranks, args.rounds, args.dtype, say)
    total = sum(path.stat().st_size for path in files[args.layouts[0]])
    print(f"{args.shape}, fp16 files of {total / 1e9:.2f} GB; load: as {args.dtype} on the CPU, once, packing included")
    print("\n".join(load.table(figures)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metaseq-api-bench", description="Measure, beside other ways.")
    kinds = parser.add_subparsers(required=True, metavar="engine | reshard | load")
    p = kinds.add_parser("engine", help="tokens a second")
    p.set_defaults(job=bench_engine)
    p.add_argument("--shape", choices=sorted(OPT_SHAPES), default="opt-125m")
    p.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    p.add_argument("--device", choices=["cpu", "cuda"])
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--against", choices=["none", "hf"], default="none", help="measure Hugging Face beside")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prompt-len", type=int, default=128)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--prefill-len", type=int, default=1024)
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--json", help="write all figures here")
    p = kinds.add_parser("reshard", help="joining FSDP shards")
    p.set_defaults(job=bench_reshard)
    p.add_argument("--shape", choices=sorted(OPT_SHAPES), default="opt-1.3b")
    p.add_argument("--shards", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--folder", type=Path, required=True, help="where 17 bytes a parameter are free")
    p = kinds.add_parser("load", help="reading a checkpoint to serve it")
    p.set_defaults(job=bench_load)
    p.add_argument("--shape", choices=sorted(OPT_SHAPES), default="opt-1.3b")
    p.add_argument("--layouts", choices=sorted(load.LAYOUTS), nargs="+", default=list(load.LAYOUTS))
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of what is kept (default: fp32)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--folder", type=Path, required=True, help="where 6 bytes a parameter are free")
    return parser


if __name__ == "__main__":
    sys.exit(main())
