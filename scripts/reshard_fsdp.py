"""Joins the FSDP shards of one tensor-parallel part, or cuts the part into other shards. metaseq's flags.

    python -m metaseq_api.scripts.reshard_fsdp \
        --input "/data/opt/checkpoint_last-model_part-0-shard*.pt" --output "/data/opt/reshard-model_part-0.pt" \
        --num-output-shards 1 --skip-optimizer-state True --unflatten-weights True

With `{part}` in both patterns, as in "x-model_part-{part}-shard*.pt", all parts are done, several at a time. What is
there already, written by the same command from the same files, stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.door import Parser, add_threads, by_part, guarded
from metaseq_api.checkpoint.outputs import Output, write_all
from metaseq_api.checkpoint.reshard import shards_of_part
from metaseq_api.progress import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="reshard_fsdp", description="Join or cut the FSDP shards of one part.")
    parser.add_argument(
        "--input",
        "--input-glob-pattern",
        required=True,
        nargs="+",
        help='the shards, e.g. "dir/x-shard*.pt"; {part} for all parts',
    )
    parser.add_argument(
        "--output",
        "--output-shard-name",
        required=True,
        help="{i} stands for the shard's number, {part} for the part's",
    )
    parser.add_argument("--num-output-shards", type=int, default=1)
    parser.add_switch("--unflatten-weights", None, "write named tensors; default: where there is one output")
    parser.add_switch("--skip-optimizer-state", False, "leave the optimizer's moments out")
    parser.add_argument("--output-dtype", choices=tuple(DTYPES), help="default: as stored")
    parser.add_switch("--drop-metaseq-req", False, "leave out the training data's state, which needs metaseq to load")
    add_threads(parser)

    def job(args: argparse.Namespace) -> None:
        unflatten = args.num_output_shards == 1 if args.unflatten_weights is None else args.unflatten_weights
        form = Form(
            unflatten=unflatten,
            skip_optimizer_state=args.skip_optimizer_state,
            dtype=DTYPES.get(args.output_dtype),
            drop_metaseq_req=args.drop_metaseq_req,
        )
        outputs: list[Output] = []
        for inputs, output in by_part(args.input, args.output):
            outputs += shards_of_part(inputs, output, args.num_output_shards, form)
        with progress_bar("writing") as progress:
            paths = write_all(outputs, progress, args.num_threads)
        print("\n".join(map(str, paths)))

    return guarded(parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
