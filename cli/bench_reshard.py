"""metaseq-api-bench-reshard: how fast FSDP shards are joined, and in how much memory.

    metaseq-api-bench-reshard --shape opt-1.3b --shards 8 --folder /scratch/bench

Against `cp` of the same bytes and against metaseq's way (load everything, join, save), in turns within one run. The
shards, optimizer state in them, are made in the folder first and kept there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from metaseq_api.bench import files
from metaseq_api.checkpoint.door import guarded
from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.errors import ResourceError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="metaseq-api-bench-reshard", description="Measure joining FSDP shards.")
    parser.add_argument("--shape", choices=sorted(OPT_SHAPES), default="opt-1.3b")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True, help="where 17 bytes a parameter are free")
    args = parser.parse_args(argv)

    def job() -> None:
        config = OPT_SHAPES[args.shape]
        needed = 17 * config.num_params
        if not any(args.folder.glob("*shard*.pt")) and files.room(args.folder) < needed:
            raise ResourceError(
                f"{args.folder} has {files.room(args.folder) / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed: "
                "name another --folder or a smaller --shape"
            )
        say = lambda text: print(text, file=sys.stderr)  # noqa: E731
        shards = files.make_shards(args.folder, config, args.shards, say)
        figures: dict[str, list[files.Figure]] = {way: [] for way in files.WAYS}
        for turn in range(args.rounds):
            for way in files.WAYS:
                figures[way].append(files.run(way, shards, args.folder))
            say(f"round {turn + 1} of {args.rounds} done")
        total = sum(s.stat().st_size for s in shards)
        print(f"{args.shape}, {args.shards} shards of {total / 1e9:.2f} GB in all, optimizer state left out")
        base = statistics.median(f.gb_per_s for f in figures["cp"])
        for way, runs in figures.items():
            rates = [f.gb_per_s for f in runs]
            middle = statistics.median(rates)
            print(
                f"  {way:<9} {middle:6.2f} GB/s ({min(rates):.2f}-{max(rates):.2f})  {middle / base:5.2f} of cp  "
                f"peak anonymous memory {max(f.peak_anon for f in runs) / 1e6:8.0f} MB"
            )

    return guarded(job)


if __name__ == "__main__":
    sys.exit(main())
