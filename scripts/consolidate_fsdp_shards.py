"""Makes one file of all FSDP shards of all parts, q, k and v apart. metaseq's flags.

    python -m metaseq_api.scripts.consolidate_fsdp_shards /data/opt/checkpoint_last --save-prefix /data/opt/whole

writes /data/opt/whole.pt (without `--save-prefix`: PREFIX_consolidated.pt). With `--no-stitch-megatron` the parts stay
apart, fused, as PREFIX-model_part-J.pt; `--megatron-part J` does one of them alone. Optimizer state is left out, as in
metaseq.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.door import Parser, add_threads, guarded
from metaseq_api.checkpoint.folder import find
from metaseq_api.checkpoint.outputs import Output, write_all
from metaseq_api.checkpoint.reshard import files_of_model
from metaseq_api.errors import SettingsError
from metaseq_api.progress import progress_bar


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="consolidate_fsdp_shards", description="Make one file of all FSDP shards of all parts.")
    parser.add_argument("pth_prefix", type=Path, help="what the shards' names begin with, -model_part-J left out")
    parser.add_argument("--save-prefix", help="default: the shards' prefix and _consolidated")
    parser.add_switch("--no-stitch-megatron", False, "keep the parts apart")
    parser.add_argument("--megatron-part", type=int, help="this part alone; implies --no-stitch-megatron")
    parser.add_switch("--strict", False, "taken for granted: what does not fit is always refused")
    parser.add_argument("--new-arch-name", help="refused: the architecture is read from the files")
    parser.add_switch("--is-ema", False, "refused: averaged weights are not read")
    add_threads(parser)

    def job(args: argparse.Namespace) -> None:
        if args.new_arch_name or args.is_ema:
            flag = "--new-arch-name" if args.new_arch_name else "--is-ema"
            raise SettingsError(f"{flag} is not offered: only the weights of an OPT, as they are, can be written")
        outputs = _files(args)
        with progress_bar("writing") as progress:
            print("\n".join(map(str, write_all(outputs, progress, args.num_threads))))

    return guarded(parser, argv, job)


def _files(args: argparse.Namespace) -> list[Output]:
    """What is to be written. Raises: CheckpointError, SettingsError."""
    checkpoint = Checkpoint(find(args.pth_prefix))
    prefix = args.save_prefix or f"{args.pth_prefix}_consolidated"
    if not args.no_stitch_megatron and args.megatron_part is None:
        return files_of_model(checkpoint, [[Path(f"{prefix}.pt")]], Form(skip_optimizer_state=True, fused_qkv=False))
    paths = [[Path(f"{prefix}-model_part-{part}.pt")] for part in range(checkpoint.num_parts)]
    outputs = files_of_model(checkpoint, paths, Form(skip_optimizer_state=True))
    if args.megatron_part is None:
        return outputs
    if not 0 <= args.megatron_part < len(outputs):
        raise SettingsError(f"--megatron-part {args.megatron_part} is none of the parts 0 to {len(outputs) - 1}")
    return [outputs[args.megatron_part]]


if __name__ == "__main__":
    sys.exit(main())
