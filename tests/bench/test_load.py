"""The bench's three layouts are one model, and every way of reading them is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metaseq_api.cli.bench import main

from metaseq_api.bench import load, reshard
from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.core.config import ModelConfig

CONFIG = ModelConfig(num_layers=2, hidden_dim=16, num_heads=4, ffn_dim=64, vocab_size=40, max_positions=14)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return load.make(tmp_path_factory.mktemp("bench"), CONFIG, list(load.LAYOUTS), lambda text: None)


def test_all_layouts_are_one_model_without_optimizer_state(files: dict[str, list[Path]]) -> None:
    assert {name: len(paths) for name, paths in files.items()} == {"shards": 8, "parts": 2, "hf": 1}
    first, *others = (open_checkpoint(paths[0].parent) for paths in files.values())
    assert not first.moments()
    for other in others:
        assert sorted(other.names()) == sorted(first.names())
        for name in first.names():
            assert torch.equal(other.tensor(name).read_all(), first.tensor(name).read_all())


def test_what_is_there_is_not_made_again(files: dict[str, list[Path]]) -> None:
    said: list[str] = []
    assert load.make(files["shards"][0].parents[1], CONFIG, list(files), said.append) == files
    assert said == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_of_a_plain_read_share_all_bytes(ranks: int, files: dict[str, list[Path]]) -> None:
    paths = files["shards"]
    kept = [piece for rank in range(ranks) for piece in load.read_plain(paths, rank, ranks)]
    assert torch.cat(kept).numpy().tobytes() == b"".join(path.read_bytes() for path in paths)


def test_every_way_is_timed_and_the_table_compares_them(files: dict[str, list[Path]]) -> None:
    figures = load.measure({"parts": files["parts"]}, [2], 1, "fp32", lambda text: None)
    assert {key[2:] for key in figures} == {
        ("cold", "plain"),
        ("cold", "read"),
        ("cold", "load"),
        ("warm", "plain"),
        ("warm", "read"),
    }
    head, cold, warm = load.cells(figures)
    assert head[-1] == "read/plain"
    assert cold[:3] == ["2 unflattened parts", "2", "cold"]
    assert cold[5]
    assert warm[5] == ""  # what follows the reading is timed once


def test_ranks_that_do_not_divide_the_model_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "--folder", str(tmp_path), "--shape", "opt-125m", "--ranks", "1", "3"]) == 6
    assert "error: --ranks 3 does not divide" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_the_layouts_that_are_asked_for_are_made(tmp_path: Path) -> None:
    assert list(load.make(tmp_path, CONFIG, ["hf"], lambda text: None)) == ["hf"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "shards"]


def test_a_folder_that_cannot_be_made_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("load", "reshard"):
        for folder in (__file__ + "/x", __file__):
            assert main([kind, "--folder", folder, "--shape", "opt-125m"]) == 8
            assert f"error: --folder {folder} cannot be made (" in capsys.readouterr().err


def test_too_little_room_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard, "room", lambda folder: 1000)
    assert main(["load", "--folder", str(tmp_path)]) == 8
    assert "are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_benches_need_neither_fairscale_nor_a_server() -> None:
    barred = ("fairscale", "flask", "waitress", "submitit", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({barred})); import metaseq_api.cli.bench"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
