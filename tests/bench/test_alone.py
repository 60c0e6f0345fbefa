"""One stream and many, without HTTP: what is asked of both sides, and what is made of the times."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from metaseq_api.cli import bench

from metaseq_api.bench import latency, limits, subject, throughput, work
from metaseq_api.core.config import OPT_SHAPES, ModelConfig
from metaseq_api.settings import DEMO, Settings

CONFIG = ModelConfig(num_layers=1, hidden_dim=16, num_heads=4, ffn_dim=32, vocab_size=4096, max_positions=512)
READY: Any = SimpleNamespace(
    config=CONFIG, dtype=torch.float32, kept=torch.float16, device=torch.device("cpu"), threads=1
)


def side(prompts: list[list[int]], num: int) -> work.Times:
    """One that takes 10 ms for each token of a prompt, and 100 ms for each step after the first token."""
    first = 0.01 * sum(map(len, prompts))
    return work.Times(first=first, made=len(prompts), whole=first + 0.1 * (num - 1))


def test_the_time_of_the_prompt_is_in_no_token_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter((1e9, 2e9, 4e9, 2e9))  # before and after each of two turns
    monkeypatch.setattr(latency, "bandwidth", lambda device, threads: next(reads))
    asked = latency.Load(rounds=2, prompt_len=50, new_tokens=11, prefill_len=200)
    rows, probes = latency.measure({"ours": side}, READY, asked, lambda text: None)
    first, each, rate, share, beside, prefill = (row.median("ours") for row in rows)
    assert (first, each, rate, prefill) == pytest.approx((500, 100, 10, 100))
    read = latency.token_bytes(CONFIG, torch.float32, 55, kept=torch.float16) / 0.1
    assert share == pytest.approx(read / 4e9)
    assert beside == pytest.approx((read / 1.5e9 + read / 3e9) / 2)
    assert len(probes) == 4


def test_the_bandwidth_is_all_threads_though_a_side_that_shares_them_was_last(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, seen = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(limits.gpu_speed, "seconds", lambda run, device: seen.append(torch.get_num_threads()) or 1.0)
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 10)
    monkeypatch.setattr(limits, "PROBE_S", 0.0)
    try:
        torch.set_num_threads(1)
        assert limits.bandwidth(torch.device("cpu"), 2) == 1 << 10
    finally:
        torch.set_num_threads(threads)
    assert seen == [2]


def test_prompt_tokens_are_never_counted_as_output() -> None:
    asked = throughput.Load(rounds=1, requests=(4,), new_tokens=11, shortest=50, longest=50)
    (level,) = throughput.measure({"ours": side}, asked, lambda text: None, lambda: None)
    assert level.all.median("ours") == pytest.approx(4 * 11 / (2 + 1))
    assert level.prefill.median("ours") == pytest.approx(100)
    assert level.decode.median("ours") == pytest.approx(40)
    assert level.step.median("ours") == pytest.approx(100)
    assert throughput.points([level], "ours") == [pytest.approx((0.1, 40))]


def test_both_sides_tell_when_the_last_first_token_was_there() -> None:
    of = subject.subject(None, DEMO, Settings(threads=torch.get_num_threads()))
    made = subject.ours(of)
    now = iter(float(i) for i in range(1000))
    prompts = work.mixed(3, "x", 4, 8)
    ours = work.by_engine(made.engine, lambda: next(now))(prompts, 5)
    assert (ours.first, ours.made, ours.whole) == (1.0, 3, 2.0)  # one look at the clock at each of the three moments
    now = iter(float(i) for i in range(1000))
    theirs = work.by_peer(subject.theirs(made.ready), lambda: next(now))(prompts, 5)
    assert (theirs.first, theirs.made, theirs.whole) == (2.0, 3, 7.0)  # the prompts, then five tokens
    assert ours.rate_after(15) == 12


def test_both_sides_choose_tokens_as_they_are_told_to() -> None:
    made = subject.ours(subject.subject(None, DEMO, Settings(threads=torch.get_num_threads())))
    how, asked = work.Sampling(temperature=0.7, top_p=0.9), []
    submit = made.engine.submit
    made.engine.submit = lambda request: asked.append(request) or submit(request)  # type: ignore[method-assign,func-returns-value]
    work.by_engine(made.engine, how=how)([[2, 5]], 3)
    assert (asked[0].params.temperature, asked[0].params.top_p) == (0.7, 0.9)
    model = subject.theirs(made.ready)
    generate, told = model.generate, []
    model.generate = lambda **more: told.append(more) or generate(**more)
    work.by_peer(model, how=how)([[2, 5]], 3)
    work.by_peer(model)([[2, 5]], 3)
    assert [(t["do_sample"], t.get("temperature"), t.get("top_p"), t.get("top_k")) for t in told] == [
        (True, 0.7, 0.9, 0),
        (False, None, None, None),
    ]


def test_a_shape_is_asked_to_choose_among_all_its_tokens() -> None:
    of = subject.subject("opt-125m", None, Settings())
    vocab = of.settings.bpe_vocab
    assert vocab is not None
    ids = json.loads(vocab.read_text("utf-8"))
    assert sorted(ids.values()) == list(range(OPT_SHAPES["opt-125m"].vocab_size))
    assert subject.subject("opt-1.3b", None, Settings()).settings.bpe_vocab == vocab


def test_prompts_are_of_the_same_lengths_each_time_and_never_the_same() -> None:
    one, two = work.mixed(8, "a"), work.mixed(8, "b")
    assert [len(p) for p in one] == [len(p) for p in two]
    assert all(64 <= len(p) <= 256 for p in one)
    assert not any(p == q for p, q in zip(one, two, strict=True))


def test_both_sides_are_measured_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPT_SHAPES, "opt-125m", CONFIG)
    few = ["--rounds", "1", "--new-tokens", "4", "--threads", str(torch.get_num_threads()), "--against", "hf"]
    kept = tmp_path / "kept.json"
    assert bench.main(["latency", *few, "--prompt-len", "4", "--prefill-len", "8", "--json", str(kept)]) == 0
    assert "Hugging Face" in capsys.readouterr().out
    told = json.loads(kept.read_text())
    assert "--json" not in told["command"]
    assert {"torch", "transformers"} <= set(told["versions"])
    assert [line[0] for line in told["table"]][1:] == [row["what"] for row in told["figures"]["rows"]]
    assert all(set(row["values"]) == {"ours", "hf"} for row in told["figures"]["rows"])

    drawn = tmp_path / "drawn.svg"
    lengths = ["--shortest", "4", "--longest", "8", "--requests", "1", "2"]
    assert bench.main(["throughput", *few, *lengths, "--plot", str(drawn)]) == 0
    assert "2 at once: decode alone" in capsys.readouterr().out
    assert "roofline" in drawn.read_text()


def test_a_checkpoint_is_measured_as_a_shape_is(capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(Path(bench.__file__).parents[1] / "metaseq_api/demo")
    few = ["--rounds", "1", "--new-tokens", "4", "--prompt-len", "4", "--prefill-len", "8", "--against", "hf"]
    assert bench.main(["latency", "--checkpoint", demo, *few, "--threads", str(torch.get_num_threads())]) == 0
    assert "ratio" in capsys.readouterr().out


def test_one_rank_is_measured_beside_two(capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(Path(bench.__file__).parents[1] / "metaseq_api/demo")
    few = ["--rounds", "1", "--new-tokens", "4", "--prompt-len", "4", "--prefill-len", "8", "--ranks", "2"]
    assert bench.main(["latency", "--checkpoint", demo, *few, "--threads", str(torch.get_num_threads())]) == 0
    head = next(line for line in capsys.readouterr().out.splitlines() if "unit" in line)
    assert re.split(r"\s\s+", head.strip()) == ["unit", "split over ranks", "ours", "split over ranks / ours"]


def test_a_prompt_that_the_window_does_not_hold_is_refused_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPT_SHAPES, "opt-125m", CONFIG)
    assert bench.main(["latency", "--prefill-len", "512", "--threads", str(torch.get_num_threads())]) == 2
    assert "window is 512; lower --prefill-len" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "JOB"),
        (["latency", "--new-tokens", "1"], "1 is too few; ask for 2 or more"),
        (["throughput", "--plot", "x.png"], "does not end in .svg"),
        (["serve", "--rate", "0"], "not a number of requests a second"),
        (["serve", "--ttft-ms", "-1"], "not a number above 0"),
        (["serve", "--shortest", "20", "--longest", "16"], "--shortest 20 is more than --longest 16"),
        (["throughput", "--top-p", "3"], "not a number above 0, of at most 1"),
        (["throughput", "--top-p", "0.9"], "changes nothing without a --temperature"),
        (["throughput", "--shortest", "20", "--longest", "16"], "--shortest 20 is more than --longest 16"),
        (["latency", "--json", "/proc/nope/x.json"], "--json /proc/nope/x.json cannot be written"),
        (["latency", "--json", __file__ + "/x.json"], "cannot be written (File exists"),
        (["throughput", "--plot", "/proc/x.svg"], "cannot be written"),
        (["page", "/proc/nope", "x.md"], "no run is kept in /proc/nope"),
        (["latency", "--shape", "opt-13b", "--checkpoint", "x"], "not allowed with"),
        (["latency", "--shape", "opt-125"], "; did you mean opt-125m?"),
        (["latency", "--new-tokns", "3"], "; did you mean --new-tokens?"),
        (["latncy"], "; did you mean latency?"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_reason(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("metaseq-api-bench: error: ")
    assert says in line
