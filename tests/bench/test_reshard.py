"""The bench's shards are what a trainer leaves, and all ways of joining them make the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from metaseq_api.cli.bench import main

from metaseq_api.bench import reshard
from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.core.config import OPT_SHAPES, ModelConfig

CONFIG = ModelConfig(num_layers=2, hidden_dim=16, num_heads=4, ffn_dim=64, vocab_size=40, max_positions=14)


def test_every_way_makes_the_same_weights(tmp_path: Path) -> None:
    shards = reshard.make_shards(tmp_path, CONFIG, 3, lambda text: None)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == dataclasses.replace(CONFIG, dtype="fp16")
    assert set(checkpoint.moments()) == {"exp_avg", "exp_avg_sq"}
    ours, theirs = tmp_path / "a/ours.pt", tmp_path / "b/theirs.pt"
    theirs.parent.mkdir()
    reshard._ours(shards, ours)
    reshard._load_all(shards, theirs)
    one, two = open_checkpoint(ours), open_checkpoint(theirs)
    for name in checkpoint.names():
        assert torch.equal(one.tensor(name).read_all(), two.tensor(name).read_all())
        assert torch.equal(one.tensor(name).read_all(), checkpoint.tensor(name).read_all())


def test_a_run_is_timed_and_its_memory_watched(tmp_path: Path) -> None:
    shards = reshard.make_shards(tmp_path, CONFIG, 2, lambda text: None)
    for way in reshard.WAYS:
        figure = reshard.run(way, shards, tmp_path)
        assert figure.num_bytes > 2 * CONFIG.num_params
        assert figure.seconds > 0


def test_too_little_room_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard, "room", lambda folder: 1000)
    assert main(["reshard", "--folder", str(tmp_path), "--shape", next(iter(OPT_SHAPES))]) == 8
    assert "are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
