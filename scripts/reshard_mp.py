"""Cuts a model into another number of tensor-parallel parts. metaseq's flags.

    python -m metaseq_api.scripts.reshard_mp \
        --input "/data/opt/reshard-model_part-*.pt" --output "/data/opt4/reshard-model_part-{i}.pt" \
        --num-output-parts 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.door import Parser, add_threads, expand, guarded
from metaseq_api.checkpoint.reshard import reshard_mp
from metaseq_api.progress import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="reshard_mp", description="Cut a model into another number of tensor-parallel parts.")
    parser.add_argument("--input", required=True, nargs="+", help='all parts, e.g. "dir/reshard-model_part-*.pt"')
    parser.add_argument("--output", required=True, help="{i} stands for the part's number")
    parser.add_argument("--num-output-parts", type=int, default=1)
    parser.add_argument("--eps", type=float, default=1e-8, help="warn where copies of a tensor differ by more")
    parser.add_switch("--skip-optimizer-state", False, "leave the optimizer's moments out")
    parser.add_argument("--output-dtype", choices=tuple(DTYPES), help="default: as stored")
    parser.add_switch("--drop-metaseq-req", False, "leave out the training data's state, which needs metaseq to load")
    add_threads(parser)

    def job(args: argparse.Namespace) -> None:
        form = Form(
            skip_optimizer_state=args.skip_optimizer_state,
            dtype=DTYPES.get(args.output_dtype),
            drop_metaseq_req=args.drop_metaseq_req,
        )
        with progress_bar("writing") as progress:
            paths = reshard_mp(
                expand(args.input),
                args.output,
                num_output_parts=args.num_output_parts,
                eps=args.eps,
                form=form,
                progress=progress,
                num_threads=args.num_threads,
            )
        print("\n".join(map(str, paths)))

    return guarded(parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
