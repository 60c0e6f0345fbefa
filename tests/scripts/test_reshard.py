"""The doors, run as metaseq's own documents run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metaseq_api.scripts.consolidate_fsdp_shards import main as consolidate
from metaseq_api.scripts.reshard_consolidated import main as cut
from metaseq_api.scripts.reshard_fsdp import main as fsdp
from metaseq_api.scripts.reshard_mp import main as mp
from support.checkpoints import fused_weights, load, logical_weights, same, with_dtype, write_shards

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.progress import progress_bar

OUTPUT = "decoder.output_projection.weight"
LOOP = r"""
set -eu
CHECKPOINT_PATH=$1
for j in 0 1; do
    "$PYTHON" -m metaseq_api.scripts.reshard_fsdp \
    --input "$CHECKPOINT_PATH/checkpoint_last-model_part-$j-shard*.pt" \
    --output "$CHECKPOINT_PATH/reshard-model_part-$j.pt" \
    --num-output-shards 1 --skip-optimizer-state True --unflatten-weights True
done
"$PYTHON" -m metaseq_api.scripts.reshard_mp \
    --input "$CHECKPOINT_PATH/reshard-model_part-*.pt" \
    --output "$CHECKPOINT_PATH/mp4/reshard-model_part-{i}.pt" --num-output-parts 4
"""


def test_metaseqs_loop_runs_but_for_the_packages_name(tmp_path: Path) -> None:
    write_shards(tmp_path, parts=2, shards=3)
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", LOOP, "-", tmp_path], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100 %" in done.stderr
    assert str(tmp_path / "reshard-model_part-1.pt") in done.stdout
    for folder, parts in ((tmp_path, 2), (tmp_path / "mp4", 4)):
        checkpoint = open_checkpoint(folder)
        assert (checkpoint.num_parts, checkpoint.layout) == (parts, f"unflattened, {parts} parts x 1 shards")
        embed = checkpoint.tensor("decoder.embed_tokens.weight").read_all()
        assert torch.equal(embed, fused_weights(with_dtype("fp16"))["decoder.embed_tokens.weight"])
        assert "last_optimizer_state" not in load(folder / "reshard-model_part-0.pt")


def test_flags_are_taken_in_every_spelling_metaseq_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, parts=1, shards=2)
    monkeypatch.chdir(tmp_path)
    old = ["--input-glob-pattern", "checkpoint_last-model_part-0-shard*.pt", "--output-shard-name", "a-shard{i}.pt"]
    assert fsdp([*old, "--num_output_shards=3", "--skip_optimizer_state", "--unflatten_weights", "False"]) == 0
    assert sorted(Path().glob("a-shard*.pt")) == [Path(f"a-shard{i}.pt") for i in range(3)]
    assert "last_optimizer_state" not in load(Path("a-shard1.pt"))
    assert fsdp(["--input", "a-shard*.pt", "--output", "b.pt", "--output-dtype", "bf16", "--drop-metaseq-req"]) == 0
    assert load(Path("b.pt"))["model"]["decoder.embed_tokens.weight"].dtype == torch.bfloat16


def test_more_shards_alone_means_flat_ones(tmp_path: Path) -> None:
    write_shards(tmp_path, parts=1, shards=2)
    pattern = f"{tmp_path}/checkpoint_last-model_part-0-shard*.pt"
    assert fsdp(["--input", pattern, "--output", f"{tmp_path}/out/x-shard{{i}}.pt", "--num-output-shards", "4"]) == 0
    assert "flat_param_0" in load(tmp_path / "out" / "x-shard3.pt")["model"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("pattern", 3, "matches no file"),
        ("truncate", 4, "shard1.pt"),
        ("missing", 3, "shard1.pt is missing"),
        ("foreign", 5, "is of another model"),
        ("parts", 6, "--num-output-parts 3 does not divide"),
        ("output", 2, "put {i} into it"),
        ("folder", 8, "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_a_code_and_nothing_written(
    change: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_shards(tmp_path / "in", parts=1, shards=3)
    out = tmp_path / "out"
    args = ["--input", f"{tmp_path}/in/*.pt", "--output", f"{out}/x-{{i}}.pt"]
    if change == "pattern":
        args[1] = f"{tmp_path}/nothing*.pt"
    elif change == "truncate":
        paths[1].write_bytes(paths[1].read_bytes()[:3000])
    elif change == "missing":
        paths[1].unlink()
    elif change == "foreign":
        write_shards(tmp_path / "other", with_dtype("bf16"), parts=1, shards=3)[2].replace(paths[2])
    elif change == "parts":
        args += ["--num-output-parts", "3"]
    elif change == "output":
        args[3], args[4:] = f"{out}/x.pt", ["--num-output-parts", "2"]
    else:
        out.touch()
    assert mp(args) == code
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(err) == 1
    assert words in err[0]
    assert not out.is_dir()


def test_a_pattern_that_names_the_part_does_them_all(tmp_path: Path) -> None:
    write_shards(tmp_path, parts=2, shards=3)
    pattern = f"{tmp_path}/checkpoint_last-model_part-{{part}}-shard*.pt"
    assert fsdp(["--input", pattern, "--output", f"{tmp_path}/all/reshard-model_part-{{part}}.pt"]) == 0
    whole, apart = open_checkpoint(tmp_path / "all"), open_checkpoint(tmp_path)
    assert (whole.num_parts, whole.num_shards) == (2, 1)
    for name in apart.names():
        assert torch.equal(whole.tensor(name).read_all(), apart.tensor(name).read_all())


@pytest.mark.parametrize(
    ("remove", "output", "code", "says"),
    [
        (None, "all/reshard.pt", 2, "must stand in both"),
        (0, "all/reshard-{part}.pt", 3, "model_part-0"),
        ("all", "all/reshard-{part}.pt", 3, "matches no file"),
    ],
)
def test_a_pattern_for_parts_says_what_is_missing(
    remove: object, output: str, code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in write_shards(tmp_path, parts=2, shards=1):
        if remove == "all" or (remove == 0 and "part-0" in path.name):
            path.unlink()
    pattern = f"{tmp_path}/checkpoint_last-model_part-{{part}}-shard*.pt"
    assert fsdp(["--input", pattern, "--output", f"{tmp_path}/{output}"]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_an_unknown_flag_or_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--num-parts", "2"], ["--skip-optimizer-state", "maybe"], ["--output-dtype", "int8"]):
        assert fsdp(["--input", "x", "--output", "y", *args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("reshard_fsdp: error: ")
        assert args[-1] in line


def test_a_log_hears_of_progress_every_few_seconds_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    with caplog.at_level("INFO"), progress_bar("writing", lambda: now[0]) as progress:
        told = progress(100)
        for second in range(1, 11):
            now[0] = second
            told(10)
    assert len(caplog.records) == 2
    assert "50 %" in caplog.records[0].getMessage()
    assert "5 s left" in caplog.records[0].getMessage()
    assert "100 %" in caplog.records[1].getMessage()


# --------------------------------------------------------------------------------------- metaseq's other two scripts


def test_a_consolidated_part_is_cut_into_the_shards_of_the_trainer(tmp_path: Path) -> None:
    want = write_shards(tmp_path, with_dtype("fp16"), parts=2, shards=3)
    whole = f"{tmp_path}/reshard-model_part-{{part}}.pt"
    assert fsdp(["--input", f"{tmp_path}/checkpoint_last-model_part-{{part}}-shard*.pt", "--output", whole]) == 0
    output = f"{tmp_path}/out/checkpoint_last-model_part-{{part}}-shard{{i}}.pt"
    assert cut(["--input", whole, "--output", output, "--num-output-shards", "3"]) == 0
    for path in want:
        old, new = load(path), load(tmp_path / "out" / path.name)
        for key in ("model", "shard_metadata", "last_optimizer_state"):
            assert same(old[key], new[key]), (path, key)


def test_all_shards_of_all_parts_become_one_file_with_q_k_and_v_apart(tmp_path: Path) -> None:
    write_shards(tmp_path, with_dtype("fp16"), parts=2, shards=3)
    assert consolidate([f"{tmp_path}/checkpoint_last"]) == 0
    state = load(tmp_path / "checkpoint_last_consolidated.pt")
    wanted = logical_weights(fused_weights(with_dtype("fp16")))
    assert {name for name in state["model"] if name not in wanted} == {"decoder.version", OUTPUT}
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in wanted.items())
    assert "last_optimizer_state" not in state
    checkpoint = open_checkpoint(tmp_path / "checkpoint_last_consolidated.pt")
    assert (checkpoint.num_parts, checkpoint.config) == (1, with_dtype("fp16"))


def test_the_parts_are_kept_apart_on_request_and_one_of_them_can_be_done_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, with_dtype("fp16"), parts=2, shards=3)
    prefix = ["--save-prefix", f"{tmp_path}/out/whole"]
    assert consolidate([f"{tmp_path}/checkpoint_last", *prefix, "--megatron-part", "1"]) == 0
    assert os.listdir(tmp_path / "out") == ["whole-model_part-1.pt"]
    assert consolidate([f"{tmp_path}/checkpoint_last", *prefix, "--no-stitch-megatron"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["whole-model_part-0.pt", "whole-model_part-1.pt"]
    wanted = logical_weights(fused_weights(with_dtype("fp16")))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(checkpoint.tensor(name).read_all(), tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--megatron-part", "2"], 2, "none of the parts 0 to 1"),
        (["--is-ema"], 2, "--is-ema is not offered"),
        (["--new-arch-name", "gpt"], 2, "--new-arch-name is not offered"),
    ],
)
def test_what_consolidating_does_not_do_is_refused(
    more: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, parts=2, shards=1)
    before = sorted(os.listdir(tmp_path))
    assert consolidate([f"{tmp_path}/checkpoint_last", *more]) == code
    assert words in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before
