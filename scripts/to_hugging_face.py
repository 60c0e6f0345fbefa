"""Writes a checkpoint of any layout as a folder that Hugging Face's transformers loads.

    python -m metaseq_api.scripts.to_hugging_face --input /data/opt/175B --output /data/opt-175b-hf

The tokenizer's files are copied where they are found beside the checkpoint, one folder up, or where they are named.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from metaseq_api import log
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.door import Parser, guarded
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.to_hugging_face import MAX_FILE_BYTES, write_hugging_face
from metaseq_api.errors import SettingsError, TokenizerError
from metaseq_api.progress import progress_bar
from metaseq_api.tokenizer import Tokenizer, find_files

TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "add_bos_token": True,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
    "errors": "replace",
}
"""As OPT's published ones: </s> in front of every text."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="to_hugging_face", description="Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("--input", type=Path, required=True, help="a folder of any layout, or one of its files")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--output-dtype", choices=tuple(DTYPES), help="default: as stored")
    parser.add_argument("--max-file-gb", type=float, default=MAX_FILE_BYTES / 1e9, help="default: %(default)s")
    parser.add_argument("--vocab-filename", type=Path)
    parser.add_argument("--merges-filename", type=Path)
    args = parser.parse_args(argv)
    log.setup()

    def job() -> None:
        if not args.max_file_gb > 0:
            raise SettingsError(f"--max-file-gb is {args.max_file_gb}; it must be more than 0")
        checkpoint = open_checkpoint(args.input)
        with progress_bar("writing") as progress:
            paths = write_hugging_face(
                checkpoint,
                args.output,
                dtype=args.output_dtype,
                max_file_bytes=int(args.max_file_gb * 1e9),
                other_files=tokenizer_files(args, checkpoint.config.vocab_size),
                progress=progress,
            )
        print("\n".join(map(str, paths)))

    return guarded(job)


def tokenizer_files(args: argparse.Namespace, vocab_size: int) -> dict[str, bytes]:
    """Read the tokenizer's files, under the names transformers has for them; none where there are none."""
    named = args.vocab_filename is not None or args.merges_filename is not None
    try:
        vocab, merges = find_files(args.input, args.vocab_filename, args.merges_filename)
    except TokenizerError as error:
        if named:
            raise
        logging.getLogger(__name__).warning("%s; the model is written without", error)
        return {}
    Tokenizer.load(vocab, merges, model_vocab_size=vocab_size)
    out = {"vocab.json": vocab.read_bytes(), "merges.txt": merges.read_bytes()}
    if vocab == merges:
        out = {"tokenizer.json": vocab.read_bytes()}
    config = vocab.with_name("tokenizer_config.json")
    text = json.dumps(TOKENIZER_CONFIG, indent=2, sort_keys=True).encode()
    return out | {"tokenizer_config.json": config.read_bytes() if config.is_file() else text}


if __name__ == "__main__":
    sys.exit(main())
