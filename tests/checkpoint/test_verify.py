"""Verification reads every number and names the file that is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import TINY, fused_weights

from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.trainer import write_trainer_checkpoint
from metaseq_api.checkpoint.verify import Finding, verify


def write(folder: Path, weights: dict[str, torch.Tensor], *, num_parts: int = 1, num_shards: int = 3) -> Path:
    write_trainer_checkpoint(
        folder, weights, TINY, num_parts=num_parts, num_shards=num_shards, dtype=torch.float32, optimizer_state=False
    )
    return folder


def sound() -> dict[str, torch.Tensor]:
    """Weights as a training leaves them: norms about 1."""
    return {n: t + (1 if n.endswith("norm.weight") else 0) for n, t in fused_weights(TINY).items()}


def findings(folder: Path) -> list[Finding]:
    return verify(open_checkpoint(folder))


def shard(folder: Path, k: int, part: int = 0) -> Path:
    return folder / f"checkpoint_last-model_part-{part}-shard{k}.pt"


@pytest.mark.parametrize(("num_parts", "num_shards"), [(1, 1), (1, 3), (2, 2)])
def test_a_sound_checkpoint_gives_no_finding(num_parts: int, num_shards: int, tmp_path: Path) -> None:
    assert findings(write(tmp_path, sound(), num_parts=num_parts, num_shards=num_shards)) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_found_and_its_tensor_named(value: float, tmp_path: Path) -> None:
    weights = sound()
    weights["decoder.layers.1.fc2.weight"][3, 2] = value
    (found,) = findings(write(tmp_path, weights))
    assert "decoder.layers.1.fc2.weight" in found.what
    assert found.fatal


def test_swapped_shards_show_in_the_layer_norms(tmp_path: Path) -> None:
    write(tmp_path, sound(), num_shards=2)
    a, b = shard(tmp_path, 0), shard(tmp_path, 1)
    kept = tmp_path / "kept"
    a.rename(kept)
    b.rename(a)
    kept.rename(b)
    assert any("swapped" in f.what for f in findings(tmp_path))


def test_a_repeated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, sound())
    shutil.copy(shard(tmp_path, 0), shard(tmp_path, 1))
    assert any(f.path == shard(tmp_path, 1) and "same numbers" in f.what for f in findings(tmp_path))


def test_copies_that_differ_between_parts_are_named(tmp_path: Path) -> None:
    weights = sound()
    write(tmp_path, weights, num_parts=2, num_shards=1)
    weights["decoder.layer_norm.bias"] = weights["decoder.layer_norm.bias"] + 0.5
    write(tmp_path / "other", weights, num_parts=2, num_shards=1)
    shutil.copy(shard(tmp_path / "other", 0, part=1), shard(tmp_path, 0, part=1))
    (found,) = findings(tmp_path)
    assert found.path == shard(tmp_path, 0, part=1)
    assert "decoder.layer_norm.bias differs by up to 0.5" in found.what
