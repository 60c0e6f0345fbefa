"""A shard at another one's place is found by what it says and by what it holds, and none is suspected in vain."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path

import pytest
import torch
from support.checkpoints import TINY, edit, load, write_shards

from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.finding import Finding
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.order import misplaced
from metaseq_api.checkpoint.reshard import reshard_fsdp, reshard_mp
from metaseq_api.settings import DEMO

NUM_SHARDS = 24


def swap(one: Path, other: Path) -> None:
    kept = one.with_suffix(".kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


def found(folder: Path) -> list[Finding]:
    return list(misplaced(open_checkpoint(folder)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model, which is trained, as one part of many shards that do not tell the name they were saved under."""
    folder = tmp_path_factory.mktemp("trained")
    drop = {"skip_optimizer_state": True}
    whole = [
        reshard_fsdp(sorted(DEMO.glob(f"*part-{j}-shard*.pt")), f"{folder}/in/x-model_part-{j}.pt", form=Form(**drop))[
            0
        ]
        for j in (0, 1)
    ]
    (one,) = reshard_mp(whole, f"{folder}/one/x-model_part-0.pt", form=Form(**drop))
    output, form = f"{folder}/x-model_part-0-shard{{i}}.pt", Form(unflatten=False, **drop)
    paths = reshard_fsdp([one], output, num_output_shards=NUM_SHARDS, form=form)
    for path in paths:
        state = load(path)
        with path.with_suffix(".new").open("wb") as file:
            torch.save(state, file)
        path.with_suffix(".new").replace(path)
    return paths


def test_swapped_shards_of_a_trained_model_show_in_the_columns_of_its_matrices(trained: list[Path]) -> None:
    assert found(trained[0].parent) == []
    named = 0
    pairs = list(combinations(trained[:-1], 2))[::9]
    for one, other in pairs:
        swap(one, other)
        try:
            paths = {f.path for f in found(one.parent) if "does not fit its place" in f.what and f.fatal}
        finally:
            swap(one, other)
        assert paths in (set(), {one, other})
        named += bool(paths)
    assert named > len(pairs) * 2 // 3


def test_matrices_without_a_pattern_raise_no_suspicion(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, hidden_dim=64, embed_dim=64, ffn_dim=256, vocab_size=800)
    write_shards(tmp_path, config, parts=1, shards=7, optimizer_state=False)
    assert found(tmp_path) == []
    swap(*(tmp_path / f"checkpoint_last-model_part-0-shard{k}.pt" for k in (1, 4)))
    assert not any(f.fatal for f in found(tmp_path))


def test_the_rank_that_wrote_a_shard_tells_its_place(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=2, shards=3)
    for index, path in enumerate(paths):
        part, shard = divmod(index, 3)
        edit(path, lambda s, rank=2 * shard + part: s["cfg"]["distributed_training"].update(distributed_rank=rank))
    assert found(tmp_path) == []
    swap(paths[3], paths[4])
    ranks = [f for f in found(tmp_path) if "was written by rank" in f.what]
    assert [(f.path, f.fatal) for f in ranks] == [(paths[3], True), (paths[4], True)]
    assert "by rank 3, and its place is that of rank 1; are shards swapped" in ranks[0].what


def test_files_that_all_have_the_first_ones_cfg_are_not_suspected(tmp_path: Path) -> None:
    for path in write_shards(tmp_path, parts=1, shards=3):
        edit(path, lambda s: s["cfg"]["distributed_training"].update(distributed_rank=0))
    assert found(tmp_path) == []


@pytest.mark.parametrize("ours", [True, False])
def test_a_file_that_was_saved_under_the_name_of_another_shard_is_remarked(ours: bool, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=4, optimizer_state=False)
    if ours:
        output, form = f"{tmp_path}/new/x.pt-model_part-0-shard{{i}}.pt", Form(unflatten=False)
        paths = reshard_fsdp(paths, output, num_output_shards=4, form=form)
    assert found(paths[0].parent) == []
    swap(paths[1], paths[2])
    named = found(paths[0].parent)
    assert [(f.path, f.fatal) for f in named] == [(paths[1], False), (paths[2], False)]
    assert "-model_part-0-shard2" in named[0].what
    assert "that of another part or shard" in named[0].what


def test_a_file_that_was_given_another_name_altogether_is_not_remarked(tmp_path: Path) -> None:
    for index, path in enumerate(write_shards(tmp_path, parts=1, shards=2)):
        path.rename(tmp_path / f"mine-shard{index}.pt")
    assert found(tmp_path) == []


def test_numbers_where_padding_should_be_are_another_shards(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=5)
    edit(paths[-1], lambda s: s["model"]["flat_param_0"].__setitem__(-1, 1.0))
    padding = load(paths[-1])["shard_metadata"]["param_metadata"][0]["params"]["flat_param_0"]["padding"]
    (only,) = found(tmp_path)
    assert (only.path, only.fatal, padding > 0) == (paths[-1], True, True)
    assert "other numbers than zeros" in only.what
