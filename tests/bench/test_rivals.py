"""The harness that runs other servers: how it is called, what is read of what it writes, and our adapter in it.

The harness here is a stand-in of a few lines: real rivals take gigabytes and an hour.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaseq_api.bench.rivals import Adapter, Asked, cells, measure, read
from metaseq_api.errors import SettingsError
from metaseq_api.settings import DEMO

HARNESS = """
import json, pathlib, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
out = pathlib.Path(flags["--work"], flags["--results"])
assert "Adapter" in pathlib.Path(__file__).with_name("adapters").joinpath("ours.py").read_text()
metric = {"run": "decode_tps", "serve": "http_c16_stream_tps"}[sys.argv[1]]
with out.open("a") as f:
    for round in range(int(flags["--rounds"])):
        for config in flags["--configs"].split(","):
            print(f"round {round} {config}")
            for value in (1.0, 10.0 * (round + 1) + len(config)) if sys.argv[1] == "run" else (5.0, 7.0):
                told = {"config": config, "round": round, "metric": metric, "value": value}
                f.write(json.dumps(told | ({"rep": round} if sys.argv[1] == "run" else {})) + "\\n")
"""


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    (tmp_path / "harness" / "adapters").mkdir(parents=True)
    (tmp_path / "harness" / "run_peers.py").write_text(HARNESS)
    model = tmp_path / "work" / "models" / "opt-125m-rand"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    return Asked(
        harness=tmp_path / "harness",
        work=tmp_path / "work",
        model="125m",
        dtype="bf16",
        rivals=("ov", "hf"),
        serving=("vllm",),
        rounds=2,
    )


def test_everybody_is_measured_in_turns_and_the_last_of_what_was_repeated_counts(asked: Asked) -> None:
    (asked.work / "results-125m-bf16.jsonl").write_text("what another run left")
    said: list[str] = []
    found = measure(asked, lambda line: said.append(str(line)))
    assert said[:3] == ["round 0 ours:bf16", "round 0 ov:bf16", "round 0 hf:bf16"]
    decode, http = found.rows
    assert decode.values == {"ours": [19.0, 29.0], "ov": [17.0, 27.0], "hf": [17.0, 27.0]}
    assert http.values == {"ours": [5.0, 7.0, 5.0, 7.0], "vllm": [5.0, 7.0, 5.0, 7.0]}
    assert cells(found.rows)[1] == [
        "one stream: decode",
        "24.0 (19.0-29.0)",
        "22.0 (17.0-27.0)",
        "-",
        *["22.0 (17.0-27.0)", "1.09"],
    ]
    assert not list((asked.harness / "adapters").iterdir()), "the harness itself is left alone"


def test_versions_and_whether_the_texts_agree_are_told() -> None:
    lines: list[dict[str, object]] = [
        {"config": "ours:bf16", "event": "check", "first8": [1, 2, 3]},
        {"config": "ov:bf16", "event": "loaded", "membw": 20.0, "info": {"genai": "2026.4"}},
        {"config": "ov:bf16", "event": "check", "first8": [1, 2, 4]},
        {"config": "hf:bf16", "event": "loaded", "membw": 25.0, "info": {"transformers": "5"}},
    ]
    told = read([json.dumps(line) for line in lines]).told()
    assert "OpenVINO GenAI 2026.4 (2 of 8 greedy tokens are ours)" in told
    assert "Hugging Face 5 (0 of 8" in told
    assert "20.0-25.0 GB/s" in told


def test_a_harness_that_is_not_there_or_fails_is_named(asked: Asked, tmp_path: Path) -> None:
    (asked.harness / "run_peers.py").write_text("raise SystemExit(3)")
    with pytest.raises(SettingsError, match="failed with code 3"):
        measure(asked, lambda line: None)
    (asked.harness / "run_peers.py").unlink()
    with pytest.raises(SettingsError, match=r"run_peers\.py is not there; --harness and --work"):
        measure(asked, lambda line: None)


def test_our_adapter_gives_exactly_so_many_tokens() -> None:
    adapter = Adapter(str(DEMO), "fp32", 1, {})
    assert [len(tokens) for tokens in adapter.generate([[2, 5, 6], [2, 9]], 7)] == [7, 7]
    assert set(adapter.info()) == {"metaseq-api", "torch"}
