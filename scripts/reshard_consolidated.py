"""Cuts an unflattened part into FSDP shards, as training wants them. metaseq's flags.

    python -m metaseq_api.scripts.reshard_consolidated \
        --input /data/opt/reshard-model_part-0.pt --output "/data/opt/checkpoint_last-model_part-0-shard{i}.pt" \
        --num-output-shards 8

The same as reshard_fsdp with `--unflatten-weights False`; with `{part}` in both names all parts are done. Optimizer
state is cut with the weights where the part holds any.
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
    parser = Parser(prog="reshard_consolidated", description="Cut an unflattened part into FSDP shards.")
    parser.add_argument("--input", required=True, help="a part; {part} for all parts")
    parser.add_argument("--output", required=True, help="{i} stands for the shard's number, {part} for the part's")
    parser.add_argument("--num-output-shards", type=int, default=1)
    parser.add_switch("--skip-optimizer-state", False, "leave the optimizer's moments out")
    parser.add_argument("--output-dtype", choices=tuple(DTYPES), help="default: as stored")
    add_threads(parser)

    def job(args: argparse.Namespace) -> None:
        form = Form(
            unflatten=False,
            skip_optimizer_state=args.skip_optimizer_state,
            dtype=DTYPES.get(args.output_dtype),
        )
        outputs: list[Output] = []
        for inputs, output in by_part([args.input], args.output):
            outputs += shards_of_part(inputs, output, args.num_output_shards, form)
        with progress_bar("writing") as progress:
            paths = write_all(outputs, progress, args.num_threads)
        print("\n".join(map(str, paths)))

    return guarded(parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
