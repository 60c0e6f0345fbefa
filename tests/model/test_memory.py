"""The memory plan knows what is free, under SLURM's --mem too, and says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.errors import MemoryTooSmall
from metaseq_api.model import memory
from metaseq_api.settings import Settings

GIB = memory.GIB


def machine(folder: Path, groups: dict[str, dict[str, int | str]], line: str = "0::/job/step") -> int:
    """Free bytes on a machine with 64 GiB free and these control groups."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    (folder / "proc/self/cgroup").write_text(line + "\n")
    for name, files in groups.items():
        (folder / "groups" / name).mkdir(parents=True, exist_ok=True)
        for file, value in files.items():
            (folder / "groups" / name / file).write_text(f"{value}\n")
    return memory.available_bytes(folder / "proc", folder / "groups")


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert machine(tmp_path, {"job/step": {"memory.max": "max", "memory.current": 5}}) == 64 * GIB


def test_a_limit_above_the_own_group_holds(tmp_path: Path) -> None:
    job: dict[str, int | str] = {"memory.max": 8 * GIB, "memory.current": 2 * GIB}
    assert machine(tmp_path, {"job": job, "job/step": {"memory.max": "max", "memory.current": 0}}) == 6 * GIB


def test_pages_of_files_that_were_read_count_as_free(tmp_path: Path) -> None:
    stat = f"anon 1\ninactive_file {5 * GIB}"
    files: dict[str, int | str] = {"memory.max": 8 * GIB, "memory.current": 8 * GIB, "memory.stat": stat}
    assert machine(tmp_path, {"job/step": files}) == 5 * GIB


def test_the_older_control_groups_are_read_too(tmp_path: Path) -> None:
    files: dict[str, int | str] = {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": GIB}
    assert machine(tmp_path, {"memory/slurm/job": files}, "5:cpu,memory:/slurm/job") == 3 * GIB


def plan(
    free: int,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float16,
    kept: torch.dtype = torch.float16,
) -> memory.Plan:
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    return memory.plan(
        OPT_SHAPES["opt-125m"],
        settings,
        dtype=dtype,
        kept=kept,
        device=torch.device("cpu"),
        tensor_size=1,
        ranks_here=1,
        max_seq_len=2048,
    )


def test_the_cache_gets_what_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(GIB, Settings(), monkeypatch)
    table = 50272 * 768
    assert found.weight_bytes == 2 * (OPT_SHAPES["opt-125m"].num_params + table)
    assert found.step_bytes == 2 * 2048 * (6 * 768 + 3072)
    assert found.num_blocks == (GIB - found.weight_bytes - found.step_bytes) // found.block_bytes


def test_halves_that_are_multiplied_in_fp32_are_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(GIB, Settings(), monkeypatch, dtype=torch.float32)
    assert found.weight_bytes == 2 * OPT_SHAPES["opt-125m"].num_params + 4 * 50272 * 768  # and a table to look up in


@pytest.mark.parametrize(
    ("free", "tokens", "says"),
    [
        (GIB // 4, None, "split the model"),
        (GIB // 3, None, "one sequence"),
        (8 * GIB, 10**9, "lower CACHE_TOKENS"),
        (8 * GIB, 100, "CACHE_TOKENS is 100, less than one sequence"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(
    free: int, tokens: int | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryTooSmall, match=says):
        plan(free, Settings(cache_tokens=tokens), monkeypatch)
