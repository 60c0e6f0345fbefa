"""The door that makes the demo checkpoint, on a model so small that it takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.tokenizer import Tokenizer, find_files

DOOR = [sys.executable, "-m", "metaseq_api.scripts.make_demo_checkpoint"]


def test_a_smoke_run_leaves_a_whole_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = subprocess.run(
        [*DOOR, "--smoke", "--steps", "2", "--output", str(output)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    assert "2/2" in done.stderr  # the progress bar
    shards = [f"checkpoint_last-model_part-{part}-shard{shard}.pt" for part in (0, 1) for shard in (0, 1)]
    assert sorted(p.name for p in output.iterdir()) == sorted([*shards, "vocab.json", "merges.txt"])
    checkpoint = open_checkpoint(output)
    assert (checkpoint.num_parts, checkpoint.num_shards, checkpoint.config.dtype) == (2, 2, "fp16")
    tokenizer = Tokenizer.load(*find_files(output, None, None), model_vocab_size=checkpoint.config.vocab_size)
    assert tokenizer.decode([0, 1, 2, 3]) == "<s><pad></s><unk>"
    text = 'def f(x):\n    """Return x."""\n'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_missing_output_is_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(DOOR, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--output" in done.stderr


def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [*DOOR, "--smoke", "--output", str(tmp_path / "file" / "demo")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("make_demo_checkpoint: error: --output")
    assert done.stderr.count("\n") == 1
