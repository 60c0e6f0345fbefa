"""A byte-level tokenizer of 4 + 256 entries and a few merges, for tests that need text but no trained vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from metaseq_api.tokenizer import _LETTERS, Tokenizer

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
VOCAB_SIZE = 272
"""Rows of a model for it: 263 entries, padded to a multiple of 8 and of 16."""


def write(folder: Path) -> tuple[Path, Path]:
    """Write vocab.json and merges.txt."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *_LETTERS, *("".join(m) for m in MERGES)]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({t: i for i, t in enumerate(tokens)}), "utf-8")
    merges.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES), "utf-8")
    return vocab, merges


def tiny_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(*write(folder), model_vocab_size=VOCAB_SIZE)
