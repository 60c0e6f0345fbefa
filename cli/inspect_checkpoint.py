"""metaseq-api-inspect: what a folder of checkpoint files holds, without loading it; with --verify, whether it is sound.

metaseq-api-inspect /data/opt/175B --verify
metaseq-api-inspect /data/opt/66B --verify --checksums opt66b_md5sum_shards.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaseq_api.checkpoint import md5sums
from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.door import Parser, guarded
from metaseq_api.checkpoint.md5sums import Md5Sums
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.verify import verify
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.core.config import OPT_SHAPES, ModelConfig
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch, ParallelSizeError
from metaseq_api.progress import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    """Say what is there; exit code 0 where it can be served."""
    parser = Parser(prog="metaseq-api-inspect", description="Say what checkpoint files hold.")
    parser.add_argument("checkpoint", type=Path, help="a folder, or one of its files")
    parser.add_argument("--verify", action="store_true", help="read every number and look for damage")
    checksums = "with --verify: a csv of file names and md5 sums (default: *md5*.csv beside the checkpoint)"
    parser.add_argument("--checksums", type=Path, metavar="CSV", help=checksums)
    parser.add_argument("--json", action="store_true", help="as one JSON object")

    def job(args: argparse.Namespace) -> None:
        if args.checksums and not args.verify:
            parser.error("--checksums needs --verify")
        checkpoint = open_checkpoint(args.checkpoint)
        facts = describe(checkpoint)
        if args.verify:
            folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
            listed = args.checksums or md5sums.beside(folder)
            sums = Md5Sums.read(listed) if listed else None
            with progress_bar("verifying") as progress:
                findings = verify(checkpoint, progress)
            if sums:
                with progress_bar("md5 sums") as progress:
                    findings += sums.compare(folder, progress)
            facts["findings"] = [f"{f.path}: {f.what}" for f in findings if f.fatal]
            facts["remarks"] = [f"{f.path}: {f.what}" for f in findings if not f.fatal]
        if args.json:
            print(json.dumps(facts, indent=1))
        else:
            for name, value in facts.items():
                lines = value if isinstance(value, list) else [value]
                print("\n".join(f"{name if i == 0 else '':<16} {line}" for i, line in enumerate(lines or ["none"])))
        if args.verify and any(f.fatal for f in findings):
            raise CheckpointCorrupt(f"{args.checkpoint} is damaged; the findings above name the files")

    return guarded(parser, argv, job)


def describe(checkpoint: Checkpoint | WholeCheckpoint) -> dict[str, Any]:
    """What the headers tell, by name."""
    c = checkpoint.config
    dtypes = Counter(str(checkpoint.tensor(n).dtype).removeprefix("torch.") for n in checkpoint.names())
    return {
        "layout": checkpoint.layout,
        "first file": str(checkpoint.path),
        "model": f"{model_name(c)}: {c.num_layers} layers of {c.hidden_dim}, {c.num_heads} heads, ffn {c.ffn_dim}, "
        f"vocabulary {c.vocab_size}, window {c.max_positions}, {'pre' if c.pre_norm else 'post'}-norm",
        "parameters": f"{c.num_params / 1e6:.1f} M",
        "dtypes": ", ".join(f"{name} ({n} tensors)" for name, n in dtypes.items()),
        "weights": f"{checkpoint.num_bytes / 1e9:.3f} GB",
        "optimizer state": _kept(checkpoint),
        "tensor-parallel": f"can be served over {', '.join(map(str, sizes(c)))} rank(s)",
    }


def _kept(checkpoint: Checkpoint | WholeCheckpoint) -> str:
    """The kinds of optimizer vectors, or why there are none to be had: the weights are there all the same."""
    try:
        return ", ".join(checkpoint.moments()) or "none"
    except CheckpointMismatch as error:
        return f"of no use: {error}"


def model_name(config: ModelConfig) -> str:
    """The published shape this is, if it is one."""
    same = (n for n, c in OPT_SHAPES.items() if (c.num_layers, c.hidden_dim) == (config.num_layers, config.hidden_dim))
    return next(same, "an OPT of its own shape")


def sizes(config: ModelConfig) -> list[int]:
    """Tensor-parallel sizes the model allows."""
    allowed = []
    for size in range(1, config.num_heads + 1):
        try:
            config.check_parallel(size)
        except ParallelSizeError:
            continue
        allowed.append(size)
    return allowed


if __name__ == "__main__":
    sys.exit(main())
