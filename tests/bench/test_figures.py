"""Numbers are made and shown rightly: medians, percentiles, ratios, bounds, tables, a page, a plot."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from metaseq_api.bench import figures, limits, plot, report
from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.errors import SettingsError


def test_a_percentile_is_one_of_the_numbers() -> None:
    numbers = [float(n) for n in range(1, 101)]
    assert [figures.percentile(numbers, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert figures.percentile([7.0], 0.5) == 7
    assert math.isnan(figures.percentile([], 0.5))


def test_a_ratio_above_one_is_always_better_for_us() -> None:
    fast = figures.Row(what="decode", unit="tokens/s", values={"ours": [30, 10, 20], "hf": [10, 10, 10]})
    slow = figures.Row(what="each token", unit="ms", less=True, values={"ours": [5.0], "hf": [15.0]})
    alone = figures.Row(what="x", unit="s", values={"ours": [1.0]})
    assert tuple(row.ratio("ours", "hf") for row in (fast, slow, alone)) == (2.0, 3.0, None)
    head, one, *_ = figures.cells([fast, slow, alone])
    assert head == ["", "unit", "ours", "Hugging Face", "ratio"]
    assert one == ["decode", "tokens/s", "20.0 (10.0-30.0)", "10.0 (10.0-10.0)", "2.00"]


def test_tables_have_the_same_cells_on_a_terminal_and_on_a_page() -> None:
    lines = [["", "a"], ["row", "1.0"]]
    assert figures.as_text(lines).splitlines() == ["         a", "  row  1.0"]
    assert figures.as_markdown(lines) == ["|  | a |", "| --- | --: |", "| row | 1.0 |"]


def test_a_step_is_bound_by_bytes_for_few_sequences_and_by_operations_for_many() -> None:
    config = OPT_SHAPES["opt-1.3b"]
    dtype = torch.bfloat16
    roof = limits.Roofline(config=config, dtype=dtype, kept=dtype, bandwidth=100e9, operations=1e12, context_len=256)
    weights = config.num_params - 2050 * config.hidden_dim  # of the positions a step takes rows
    assert roof.step_s(1) == pytest.approx((2 * weights + 4 * 24 * 2048 * 256) / 100e9, rel=1e-6)
    assert roof.step_s(1024) == pytest.approx(2 * weights * 1024 / 1e12, rel=1e-6)
    wide = dataclasses.replace(roof, dtype=torch.float32)  # multiplied in fp32, read in half of its bytes
    assert wide.step_s(1) == pytest.approx((2 * weights + 2 * 4 * 24 * 2048 * 256) / 100e9, rel=1e-6)
    points = roof.points(10)
    assert len(points) == 5  # 1, 2, 4, 8, 16
    assert all(rate * seconds == pytest.approx(2**i) for i, (seconds, rate) in enumerate(points))


def test_a_point_that_is_faster_is_drawn_further_left_and_higher() -> None:
    drawn = plot.svg("a < b", {"ours": [(0.010, 100), (0.020, 800)], "hf": [(0.030, 50)]}, [(0.005, 200), (0.01, 2000)])
    root = ET.fromstring(drawn)
    circles = [
        (float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    assert len(circles) == 3
    (one, two, other) = circles
    assert one[0] < two[0] < other[0]
    assert two[1] < one[1] < other[1]
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "ours", "hf", "roofline"} <= set(texts)


def test_a_point_at_zero_is_left_out_of_a_plot() -> None:
    root = ET.fromstring(plot.svg("t", {"ours": [(0.0, 100), (0.02, 800)], "hf": [(0.0, 5)]}, [(0.005, 200)]))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "ours" in texts
    assert "hf" not in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 1


def test_a_page_shows_what_was_run_last() -> None:
    page = "# Title\n\n<!-- run one -->\nold\n<!-- end -->\nbetween\n<!-- run two -->\nkept\n<!-- end -->\n"
    run = report.make(["latency", "--json", "x.json", "--shape", "opt-125m"], [["", "a"], ["row", "1"]], {})
    filled = report.fill(page, {"one": run})
    assert "old" not in filled
    assert "    metaseq-api-bench latency --shape opt-125m\n" in filled
    assert "| row | 1 |" in filled
    assert run["commit"] in filled
    assert filled.endswith("between\n<!-- run two -->\nkept\n<!-- end -->\n")
    assert report.fill(filled, {"one": run}) == filled


def test_a_command_is_told_without_the_places_of_this_machine() -> None:
    argv = ["rivals", "--harness", "/a", "--work=/b", "--json=/c", "--rounds", "2", "--plot", "/d", "--shape=opt-125m"]
    said = report.make(argv, [[""]], {})["command"]
    assert said == "metaseq-api-bench rivals --harness HARNESS --work WORK --rounds 2 --shape=opt-125m"


def test_a_run_without_a_place_on_the_page_is_refused() -> None:
    with pytest.raises(SettingsError, match="no place for one; add <!-- run one -->"):
        report.fill("nothing\n", {"one": {}})


def test_kept_runs_are_found_by_their_files_names(tmp_path: Path) -> None:
    kept = tmp_path / "there" / "start.json"
    report.check_place(kept, "--json")
    report.write(json.dumps(report.make(["startup"], [["a"]], {})), kept)
    assert list(report.read_runs(kept.parent)) == ["start"]
    with pytest.raises(SettingsError, match="make bench"):
        report.read_runs(tmp_path)
    for text in ("{", "{}", "[]"):
        kept.write_text(text)
        with pytest.raises(SettingsError, match=r"start.json holds no run \("):
            report.read_runs(kept.parent)
    with pytest.raises(SettingsError, match=r"--json .*there cannot be written \(Is a directory\)"):
        report.check_place(kept.parent, "--json")


def test_the_performance_page_has_a_place_for_every_run_of_make_bench() -> None:
    root = Path(__file__).parents[2]
    made = set(re.findall(r"--json \$\(RUNS\)/([\w.-]+)\.json", (root / "Makefile").read_text()))
    places = {found["name"] for found in report.MARK.finditer((root / "docs/performance.md").read_text("utf-8"))}
    assert made
    assert made == places
