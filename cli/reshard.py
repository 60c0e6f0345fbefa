"""metaseq-api-reshard: any checkpoint as any other, all parts in one command.

metaseq-api-reshard /data/opt/175B /data/opt/175B-mp4 --parts 4
metaseq-api-reshard facebook-opt-1.3b /data/opt/1.3b --parts 2
metaseq-api-reshard /data/opt/175B /data/opt/175B-hf --to hugging-face
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metaseq_api.checkpoint.checkpoint import DTYPES, Checkpoint
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.door import Parser, add_threads, guarded
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.outputs import job_id, write_bytes
from metaseq_api.checkpoint.reshard import inputs_of, reshard
from metaseq_api.checkpoint.to_hugging_face import MAX_FILE_BYTES, write_hugging_face
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.errors import SettingsError
from metaseq_api.flags import count
from metaseq_api.progress import progress_bar
from metaseq_api.tokenizer import files_to_copy

HUGGING_FACE = "hugging-face"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="metaseq-api-reshard", description="Write any checkpoint as any other.")
    parser.add_argument("source", type=Path, help="a folder of any layout, or one of its files")
    parser.add_argument("target", type=Path, help="a folder for the new files")
    parser.add_argument("--to", choices=("metaseq", HUGGING_FACE), default="metaseq", help="default: %(default)s")
    parser.add_argument("--parts", type=count, help="tensor-parallel parts; default: as many as there are")
    parser.add_argument("--shards", type=count, default=1, help="FSDP shards of each part, flat; default: %(default)s")
    parser.add_switch("--flat", None, "write flat parameters, as training does; default: where there are shards")
    parser.add_argument("--qkv", choices=("fused", "separate"), help="default: as it is, or as metaseq has it")
    parser.add_switch("--skip-optimizer-state", False, "leave the optimizer's moments out")
    parser.add_switch("--drop-metaseq-req", False, "leave out the training data's state, which needs metaseq to load")
    parser.add_argument("--dtype", "--output-dtype", choices=tuple(DTYPES), help="default: as stored")
    parser.add_argument("--max-file-gb", type=float, default=MAX_FILE_BYTES / 1e9, help="of a Hugging Face file")
    parser.add_argument("--vocab-filename", type=Path)
    parser.add_argument("--merges-filename", type=Path)
    add_threads(parser)

    def job(args: argparse.Namespace) -> None:
        checkpoint = open_checkpoint(args.source)
        files = files_to_copy(
            args.source,
            args.vocab_filename,
            args.merges_filename,
            vocab_size=checkpoint.config.vocab_size,
            hugging_face=args.to == HUGGING_FACE,
        )
        write = _hugging_face if args.to == HUGGING_FACE else _metaseq
        print("\n".join(map(str, write(args, checkpoint, files))))

    return guarded(parser, argv, job)


def _metaseq(args: argparse.Namespace, checkpoint: Checkpoint | WholeCheckpoint, files: dict[str, bytes]) -> list[Path]:
    form = Form(
        unflatten=not (args.shards > 1 if args.flat is None else args.flat),
        skip_optimizer_state=args.skip_optimizer_state,
        dtype=DTYPES.get(args.dtype),
        drop_metaseq_req=args.drop_metaseq_req,
        fused_qkv=None if args.qkv is None else args.qkv == "fused",
    )
    with progress_bar("writing") as progress:
        paths = reshard(
            checkpoint,
            args.target,
            num_parts=args.parts,
            num_shards=args.shards,
            form=form,
            progress=progress,
            num_threads=args.num_threads,
        )
    for name, data in files.items():
        write_bytes(args.target / name, data)
    return paths + [args.target / name for name in files]


def _hugging_face(
    args: argparse.Namespace, checkpoint: Checkpoint | WholeCheckpoint, files: dict[str, bytes]
) -> list[Path]:
    if args.parts or args.shards != 1 or args.flat or args.qkv:
        raise SettingsError(
            "--parts, --shards, --flat and --qkv are of metaseq's files; --to hugging-face has --max-file-gb"
        )
    if not args.max_file_gb > 0:
        raise SettingsError(f"--max-file-gb is {args.max_file_gb}; it must be more than 0")
    with progress_bar("writing") as progress:
        return write_hugging_face(
            checkpoint,
            args.target,
            dtype=args.dtype,
            max_file_bytes=int(args.max_file_gb * 1e9),
            other_files=files,
            job=job_id(inputs_of(checkpoint), args.dtype),
            progress=progress,
        )


if __name__ == "__main__":
    sys.exit(main())
