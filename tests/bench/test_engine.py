"""The engine's bench does what it is asked on both sides, and the door takes the flags that it always had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from metaseq_api.cli import bench

from metaseq_api.bench import engine
from metaseq_api.core.config import ModelConfig

CONFIG = ModelConfig(num_layers=1, hidden_dim=16, num_heads=4, ffn_dim=32, vocab_size=4096, max_positions=512)


def test_both_sides_are_measured_and_compared() -> None:
    sides = engine.sides(CONFIG, torch.float32, torch.device("cpu"), "hf")
    asked = engine.Load(rounds=1, prompt_len=4, new_tokens=4, prefill_len=8, requests=2)
    figures = engine.measure(sides, asked, lambda text: None)
    assert {name: list(rates) for name, rates in figures.items()} == {
        name: ["ours", "hf"] for name in ("decode", "prefill", "throughput")
    }
    lines = engine.table(figures)
    assert len(lines) == 3
    assert all("ratio" in line for line in lines)


def test_the_door_prints_the_table_and_writes_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.OPT_SHAPES, "opt-125m", CONFIG)
    few = ["--rounds", "1", "--prompt-len", "4", "--new-tokens", "4", "--prefill-len", "8", "--requests", "2"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert bench.main(["engine", "--shape", "opt-125m", *few, *threads, "--json", str(tmp_path / "f.json")]) == 0
    assert "tok/s  ours" in capsys.readouterr().out
    assert json.loads((tmp_path / "f.json").read_text())["arguments"]["requests"] == 2


def test_what_to_measure_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main([])
    assert stopped.value.code == 2
    assert "engine" in capsys.readouterr().err
