"""Rivals in turns: how contenders are run and asked, how the harness measures servers, and our adapter.

The harness and all in it are stand-ins of a few lines here: real rivals take gigabytes and an hour.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metaseq_api.bench import rivals
from metaseq_api.bench.figures import Row
from metaseq_api.bench.rivals import Adapter, Asked, cells, measure
from metaseq_api.errors import SettingsError
from metaseq_api.settings import DEMO

ADAPTER = """
import pathlib, time

now = 0.0
time.perf_counter = lambda: now

class Adapter:
    def __init__(self, model, precision, threads, opts):
        assert pathlib.Path(model, "config.json").is_file() and precision == "bf16" and threads > 0
        print("a library greets")

    def info(self):
        return {"genai": "2026.4", "transformers": "5"}

    def generate(self, prompts, num):
        global now
        now += EACH * num
        return [[ID] * num for _ in prompts]
"""
THREAD = """
import threading
threading.Thread(target=threading.Event().wait).start()  # as a library might leave one
"""
WORKLOAD = """
def prompt(num, seed):
    return [2] * num

def batch(num, rep):
    return [prompt(100, rep) for _ in range(num)]
"""
SERVE = """
import json, pathlib, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "serve" and "interactive_hosted" in flags["--server-cmd"]
out = pathlib.Path(flags["--work"], flags["--results"])
with out.open("a") as f:
    for round in range(int(flags["--rounds"])):
        for config in flags["--configs"].split(","):
            print(f"round {round} {config}")
            for metric, value in (("http_c16_stream_tps", 5.0 * len(config) + round), ("other", 1.0)):
                f.write(json.dumps({"config": config, "round": round, "metric": metric, "value": value}) + "\\n")
"""


def stand_in(each: float, token: int) -> str:
    """An adapter that takes so many seconds for a token of all prompts, by a clock of its own."""
    return ADAPTER.replace("EACH", str(each)).replace("ID", str(token))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    harness, work = tmp_path / "harness", tmp_path / "work"
    (harness / "adapters").mkdir(parents=True)
    (harness / "run_peers.py").write_text(SERVE)
    (harness / "workload.py").write_text(WORKLOAD)
    for side, each, token in (("ov", 0.002, 7), ("hf", 0.004, 8)):
        (harness / "adapters" / f"{side}.py").write_text(stand_in(each, token))
        python = work / "venv" / side / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
    monkeypatch.setattr(rivals, "_ADAPTER", stand_in(0.001, 7))
    model = work / "models" / "opt-125m-rand"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"dtype": "float16"}')
    return Asked(
        harness=harness, work=work, model="125m", dtype="bf16", rivals=("ov", "hf"), serving=("vllm",), rounds=2
    )


def test_everybody_stays_loaded_and_works_in_turns(asked: Asked) -> None:
    said: list[str] = []
    found = measure(asked, lambda line: said.append(str(line)))
    assert said == [
        *("ours is ready", "OpenVINO GenAI is ready", "Hugging Face is ready"),
        *[f"round {n} of 2: {rivals.METRICS[metric]}" for n in (1, 2) for metric in rivals.ROUND],
        *("round 0 ours:bf16", "round 0 vllm:bf16", "round 1 ours:bf16", "round 1 vllm:bf16"),
    ]
    prefill, decode, batch, http = found.rows
    speeds = {"ours": 1000.0, "ov": 500.0, "hf": 250.0}
    for row, num, factor in ((prefill, 6, 1024), (decode, 4, 1), (batch, 2, 32)):
        assert {s: len(of) for s, of in row.values.items()} == dict.fromkeys(speeds, num)
        assert {s: row.median(s) for s in speeds} == {s: pytest.approx(factor * v) for s, v in speeds.items()}
    assert http.values == {"ours": [45.0, 46.0], "vllm": [45.0, 46.0]}
    told = found.told()
    assert told.startswith("weights stored in float16; ")
    assert "OpenVINO GenAI 2026.4 (8 of 8 greedy tokens are ours)" in told
    assert "Hugging Face 5 (0 of 8" in told
    assert sorted(p.name for p in (asked.harness / "adapters").iterdir()) == ["hf.py", "ov.py"], "it is left alone"


def test_a_ratio_is_the_median_of_those_of_each_turn() -> None:
    row = Row(what="decode", unit="tokens/s")
    for slow, ours, ov in ((1, 30, 20), (1, 30, 20), (5, 20, 10)):  # the last time all were slower
        row.add("ours", ours / slow)
        row.add("ov", ov / slow)
        row.add("hf", 1.0)
    assert cells([row]) == [
        ["tokens/s", "ours", "OpenVINO GenAI", "Hugging Face", "ours / best rival"],
        ["decode", "30.0 (4.00-30.0)", "20.0 (2.00-20.0)", "1.00 (1.00-1.00)", "1.50"],
    ]


def test_who_cannot_be_run_or_fails_is_named(asked: Asked) -> None:
    (asked.harness / "run_peers.py").write_text("raise SystemExit(3)")
    with pytest.raises(SettingsError, match="failed with code 3"):
        measure(asked, lambda line: None)
    (asked.harness / "run_peers.py").write_text("")
    with pytest.raises(SettingsError, match="no round in which every server answered"):
        measure(asked, lambda line: None)
    late = stand_in(0.004, 8).replace("now += ", "assert num < 64, 'too long'; now += ")
    (asked.harness / "adapters" / "hf.py").write_text(late + THREAD)
    with pytest.raises(SettingsError, match="Hugging Face ended with code 1"):
        measure(asked, lambda line: None)
    assert "too long" in (asked.work / "logs" / "hf-125m-bf16.log").read_text()
    (asked.harness / "adapters" / "hf.py").write_text("raise ValueError('no such model')")
    with pytest.raises(SettingsError, match=r"Hugging Face ended with code 1; .*/logs/hf-125m-bf16\.log says why"):
        measure(asked, lambda line: None)
    assert "no such model" in (asked.work / "logs" / "hf-125m-bf16.log").read_text()
    (asked.work / "venv" / "ov" / "bin" / "python").unlink()
    with pytest.raises(SettingsError, match=r"venv/ov/bin/python cannot be run \(No such file or directory\)"):
        measure(asked, lambda line: None)
    (asked.harness / "run_peers.py").unlink()
    with pytest.raises(SettingsError, match=r"run_peers\.py is not there; --harness and --work"):
        measure(asked, lambda line: None)


def test_our_adapter_gives_exactly_so_many_tokens() -> None:
    adapter = Adapter(str(DEMO), "fp32", 1, {})
    assert [len(tokens) for tokens in adapter.generate([[2, 5, 6], [2, 9]], 7)] == [7, 7]
    assert set(adapter.info()) == {"metaseq-api", "torch"}
