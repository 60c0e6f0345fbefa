"""More than ten thousand damaged checkpoints are read, or refused in one line that names them; and nothing else.

Every family of files is damaged: bits, ranges, lengths, opcodes of pickles, JSON headers, cut-off ends; and files that
are whole say nonsense. Two processes do it, in tests/support/fuzz.py, each with a quarter of a gigabyte to spare, and
with at most five seconds for a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import TINY, fused_weights, logical_weights
from support.layouts import LAYOUTS

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.hugging_face import their_name
from metaseq_api.checkpoint.to_hugging_face import write_hugging_face

SUPPORT = Path(__file__).parents[1] / "support"
LAYER = dataclasses.replace(TINY, num_layers=1)
TIMEOUT_S = 230
OLD: dict[str, Any] = {"_use_new_zipfile_serialization": False}
LAYOUT_CASES = 90
OTHER_CASES = {"safetensors": 3400, "sharded safetensors": 1400, "HF bin": 900, "DCP": 1200, "legacy singleton": 900}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where the machine has one."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def make(folder: Path) -> list[tuple[str, int]]:
    """Write a sound checkpoint of every family; where it lies, and how often it is to be damaged."""
    out = []
    for name, layout in LAYOUTS.items():
        small = dataclasses.replace(layout, changes=layout.changes | {"num_layers": 1})
        small.make(folder / name, small.config("fp16"))
        out.append((str(folder / name), LAYOUT_CASES))
    tensors = logical_weights(fused_weights(LAYER))
    for name, count in OTHER_CASES.items():
        _write(folder / name, name, tensors)
        out.append((str(folder / name), count))
    return out


def _write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    if name == "DCP":
        dcp.save({"model": tensors, "step": 3}, checkpoint_id=folder, no_dist=True)
        (folder / "config.json").write_text('{"num_attention_heads": 4}')
    elif name == "legacy singleton":
        torch.save({"model": tensors, "cfg": {"model": {"decoder_attention_heads": 4}}}, folder / "restored.pt", **OLD)
    elif name == "HF bin":
        torch.save({their_name(n): t for n, t in tensors.items()}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text('{"num_attention_heads": 4}')
    else:
        source = folder.with_name("source")
        source.mkdir(exist_ok=True)
        torch.save({"model": tensors, "cfg": {"model": {"decoder_attention_heads": 4}}}, source / "restored.pt")
        folder.rmdir()
        size = 2000 if name == "sharded safetensors" else 10**9
        write_hugging_face(open_checkpoint(source), folder, max_file_bytes=size)
        (folder / "generation_config.json").unlink()
        shutil.rmtree(source)


@pytest.mark.slow
def test_ten_thousand_damaged_checkpoints_are_read_or_refused_in_one_line(memory: Path) -> None:
    folders = make(memory)
    processes = []
    for half in (0, 1):
        manifest = memory / f"{half}.json"
        published = dataclasses.asdict(LAYER)
        manifest.write_text(json.dumps({"published": published, "folders": folders[half::2]}))
        command = [sys.executable, str(SUPPORT / "fuzz.py"), str(manifest)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [(p.returncode, err) for p, (_, err) in zip(processes, said, strict=True)] == [(0, ""), (0, "")]
    found = [json.loads(out) for out, _ in said]
    assert [fault for one in found for fault in one["faults"]] == []
    assert sum(one["cases"] for one in found) >= 10_000
    assert sum(one["refused"] for one in found) >= 5_000
