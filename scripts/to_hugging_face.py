"""Writes a checkpoint of any layout as a folder that Hugging Face's transformers loads.

    python -m metaseq_api.scripts.to_hugging_face --input /data/opt/175B --output /data/opt-175b-hf

The tokenizer's files are copied where they are found beside the checkpoint, one folder up, or where they are named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.door import Parser, guarded
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.outputs import job_id
from metaseq_api.checkpoint.reshard import inputs_of
from metaseq_api.checkpoint.to_hugging_face import MAX_FILE_BYTES, write_hugging_face
from metaseq_api.errors import SettingsError
from metaseq_api.progress import progress_bar
from metaseq_api.tokenizer import files_to_copy


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="to_hugging_face", description="Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("--input", type=Path, required=True, help="a folder of any layout, or one of its files")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--output-dtype", choices=tuple(DTYPES), help="default: as stored")
    parser.add_argument("--max-file-gb", type=float, default=MAX_FILE_BYTES / 1e9, help="default: %(default)s")
    parser.add_argument("--vocab-filename", type=Path)
    parser.add_argument("--merges-filename", type=Path)

    def job(args: argparse.Namespace) -> None:
        if not args.max_file_gb > 0:
            raise SettingsError(f"--max-file-gb is {args.max_file_gb}; it must be more than 0")
        checkpoint = open_checkpoint(args.input)
        with progress_bar("writing") as progress:
            paths = write_hugging_face(
                checkpoint,
                args.output,
                dtype=args.output_dtype,
                max_file_bytes=int(args.max_file_gb * 1e9),
                other_files=files_to_copy(
                    args.input,
                    args.vocab_filename,
                    args.merges_filename,
                    vocab_size=checkpoint.config.vocab_size,
                    hugging_face=True,
                ),
                job=job_id(inputs_of(checkpoint), args.output_dtype),
                progress=progress,
            )
        print("\n".join(map(str, paths)))

    return guarded(parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
