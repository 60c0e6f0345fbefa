"""metaseq-api-reshard: any checkpoint as any other, in one command, and again after it broke off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from metaseq_api.cli.reshard import main
from support import tiny_tokenizer
from support.checkpoints import fused_weights, load, logical_weights, same, with_dtype, write_shards
from support.hf_opt import logits, metaseq_weights, tiny_opt
from support.layouts import LAYOUTS, weights
from support.processes import clean_env
from support.steps import Driver
from torch import Tensor
from transformers import OPTForCausalLM

from metaseq_api.checkpoint import open_checkpoint, write
from metaseq_api.checkpoint.trainer import split_part

PROMPT = [2, 5, 6, 7, 3, 9, 11]


def run(source: Path, target: Path, *more: str) -> int:
    return main([str(source), str(target), *more])


def assert_holds(folder: Path, wanted: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(wanted)
    assert all(torch.equal(checkpoint.tensor(name).read_all(), tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_goes_to_hugging_face_and_to_other_parts_and_shards_and_ends_bit_equal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[name]
    if layout.published:
        monkeypatch.setitem(__import__("metaseq_api.core.config").core.config.OPT_SHAPES, "t", layout.config("fp16"))
    layout.make(tmp_path / "in", layout.config("fp16"))
    wanted = weights(layout.config("fp16"))
    assert run(tmp_path / "in", tmp_path / "hf", "--to", "hugging-face") == 0
    assert run(tmp_path / "hf", tmp_path / "parts", "--parts", "4") == 0
    assert run(tmp_path / "parts", tmp_path / "shards", "--parts", "2", "--shards", "3") == 0
    assert run(tmp_path / "shards", tmp_path / "one", "--parts", "1", "--qkv", "separate") == 0
    for folder in ("hf", "parts", "shards", "one"):
        assert_holds(tmp_path / folder, wanted)
        found = open_checkpoint(tmp_path / folder).config
        assert (found.num_heads, found.pre_norm, found.activation) == (4, layout.config("fp16").pre_norm, "relu")
    assert open_checkpoint(tmp_path / "shards").layout == "flattened, 2 parts x 3 shards"


def test_a_hugging_face_folder_becomes_what_metaseq_would_have_written(tmp_path: Path) -> None:
    model = tiny_opt("pre-norm")
    model.save_pretrained(tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "out", "--parts", "2") == 0
    wanted = metaseq_weights(model)
    for part in range(2):
        state = load(tmp_path / "out" / f"reshard-model_part-{part}.pt")
        assert list(state["model"])[:4] == [
            "decoder.embed_tokens.weight",
            "decoder.embed_positions.weight",
            "decoder.layers.0.self_attn.qkv_proj.weight",
            "decoder.layers.0.self_attn.qkv_proj.bias",
        ]
        fused = state["model"]["decoder.layers.1.self_attn.qkv_proj.weight"].chunk(3)
        for letter, third in zip("kvq", fused, strict=True):
            assert torch.equal(third, wanted[f"decoder.layers.1.self_attn.{letter}_proj.weight"].chunk(2)[part])
        assert state["cfg"]["model"].decoder_attention_heads == 4
        assert state["cfg"]["common"]["model_parallel_size"] == 2
        assert state["model"]["decoder.version"].item() == 3
        units = state["shard_metadata"]["param_metadata"]
        assert [u["fsdp_path"] for u in units] == ["", "decoder.layers.0", "decoder.layers.1"]
    ours = open_checkpoint(tmp_path / "out")
    (got,) = Driver(ours.config, ours).step((PROMPT, 0, [3]))
    torch.testing.assert_close(got, logits(model, PROMPT), atol=1e-4, rtol=1e-5)


def test_shards_made_of_a_hugging_face_folder_are_those_of_the_trainer(tmp_path: Path) -> None:
    write_shards(tmp_path / "want", with_dtype("fp16"), parts=2, shards=3, optimizer_state=False)
    assert run(tmp_path / "want", tmp_path / "hf", "--to", "hugging-face") == 0
    assert run(tmp_path / "hf", tmp_path / "out", "--parts", "2", "--shards", "3") == 0
    for part in range(2):
        for shard in range(3):
            want = load(tmp_path / "want" / f"checkpoint_last-model_part-{part}-shard{shard}.pt")
            got = load(tmp_path / "out" / f"reshard-model_part-{part}-shard{shard}.pt")
            assert want["shard_metadata"] == got["shard_metadata"]
            assert want["model"].keys() == got["model"].keys()
            assert all(torch.equal(want["model"][key], got["model"][key]) for key in want["model"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_dcp_folder_with_optimizer_state_becomes_parts_with_it(tmp_path: Path) -> None:
    fused = fused_weights(with_dtype("fp32"))
    params = {name: torch.nn.Parameter(t.clone()) for name, t in fused.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=0.1)
    sum((p * p).sum() for p in params.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = {name: optimizer.state[p] for name, p in params.items()}
    saved = {"model": {n: p.data for n, p in params.items()}, "optim": {"state": state}}
    dcp.save(saved, checkpoint_id=tmp_path / "in", no_dist=True)
    (tmp_path / "in" / "config.json").write_text('{"num_attention_heads": 4}')
    assert run(tmp_path / "in", tmp_path / "out", "--parts", "2", "--shards", "2") == 0
    back = open_checkpoint(tmp_path / "out").moments()
    for kind in ("exp_avg", "exp_avg_sq"):
        whole = logical_weights({name: entry[kind] for name, entry in state.items()})
        assert back[kind].keys() == whole.keys()
        assert all(torch.equal(back[kind][name].read_all(), tensor) for name, tensor in whole.items())
    kept = load(tmp_path / "out" / "reshard-model_part-0-shard0.pt")["last_optimizer_state"]
    assert [entry["step"] for entry in kept["state"].values()] == [1, 1, 1]
    assert kept["param_groups"] == [{"params": [0, 1, 2]}]
    wanted = split_part({n: e["exp_avg"] for n, e in state.items()}, 1, 2)["decoder.layers.1.fc2.weight"]
    (part,) = open_checkpoint(tmp_path / "out").parts[1:]
    moment = part.moments["exp_avg"]["decoder.layers.1.fc2.weight"]
    assert torch.equal(torch.cat(list(moment.flat(0, moment.numel))), wanted.reshape(-1))


def test_optimizer_state_follows_its_parameter_through_any_chain(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", with_dtype("fp16"), parts=2, shards=3)
    before = open_checkpoint(tmp_path / "in").moments()
    chain = [("4", "1", "fused"), ("1", "5", "separate"), ("4", "2", "fused"), ("2", "3", "fused")]
    source = tmp_path / "in"
    for step, (parts, shards, qkv) in enumerate(chain):
        target = tmp_path / str(step)
        assert run(source, target, "--parts", parts, "--shards", shards, "--qkv", qkv) == 0
        source = target
    after = open_checkpoint(source).moments()
    assert before.keys() == after.keys() == {"exp_avg", "exp_avg_sq"}
    for kind, vectors in before.items():
        assert vectors.keys() == after[kind].keys()
        assert all(torch.equal(t.read_all(), after[kind][n].read_all()) for n, t in vectors.items())
    for path in (tmp_path / "in").iterdir():
        want, got = load(path), load(source / path.name.replace("checkpoint_last", "reshard"))
        for key in ("model", "last_optimizer_state"):
            assert same(want[key], got[key])


def test_the_tokenizer_goes_along_under_the_names_of_its_new_place(tmp_path: Path) -> None:
    config = with_dtype("fp16", vocab_size=tiny_tokenizer.VOCAB_SIZE)
    write_shards(tmp_path / "in", config, parts=1, shards=2)
    tiny_tokenizer.write(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--parts", "2") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "gpt2-merges.txt",
        "gpt2-vocab.json",
        "reshard-model_part-0.pt",
        "reshard-model_part-1.pt",
    ]
    assert run(tmp_path / "out", tmp_path / "hf", "--to", "hugging-face") == 0
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(os.listdir(tmp_path / "hf"))
    assert OPTForCausalLM.from_pretrained(tmp_path / "hf").config.num_attention_heads == 4


# ------------------------------------------------------------------------------------------------------ breaking off


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("form", [("--parts", "4"), ("--to", "hugging-face", "--max-file-gb", "0.000004")])
def test_a_full_disk_leaves_whole_files_and_the_same_command_finishes_the_rest(
    form: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", with_dtype("fp16"), parts=2, shards=3)
    real, calls, most = os.pwrite, [0], [10**9]

    def full(file: int, data: Any, at: int) -> int:
        calls[0] += 1
        if calls[0] > most[0]:
            raise OSError(28, "No space left on device")
        return real(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert run(tmp_path / "in", tmp_path / "all", *form) == 0
        most[0] = calls[0] * 3 // 2  # half of the next run
        assert run(tmp_path / "in", tmp_path / "out", *form, "--num-threads", "1") == 8
    assert "the disk is full while writing" in capsys.readouterr().err
    left = inodes(tmp_path / "out")
    assert left
    assert not [name for name in left if name.endswith(".partial") or name == "config.json"]
    assert run(tmp_path / "in", tmp_path / "out", *form) == 0
    after = inodes(tmp_path / "out")
    assert len(after) > len(left)
    assert left.items() <= after.items()  # not written again
    assert_holds(tmp_path / "out", logical_weights(fused_weights(with_dtype("fp16"))))
    assert run(tmp_path / "in", tmp_path / "out", *form) == 0
    assert {n: i for n, i in inodes(tmp_path / "out").items() if "part" in n or n.startswith("model-")} == {
        n: i for n, i in after.items() if "part" in n or n.startswith("model-")
    }


@pytest.mark.parametrize("change", ["flag", "input", "damage"])
def test_a_file_of_another_job_or_a_damaged_one_is_written_again(change: str, tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", with_dtype("fp16"), parts=1, shards=2)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    before = inodes(tmp_path / "out")
    if change == "input":
        os.utime(paths[0], ns=(1, 1))
    if change == "damage":
        os.truncate(tmp_path / "out" / "reshard-model_part-0.pt", 5000)
    more = ["--skip-optimizer-state"] if change == "flag" else []
    assert run(tmp_path / "in", tmp_path / "out", *more) == 0
    assert inodes(tmp_path / "out") != before
    assert ("last_optimizer_state" in load(tmp_path / "out" / "reshard-model_part-0.pt")) == (change != "flag")


def test_a_kill_in_the_middle_leaves_no_half_file_under_a_final_name(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", with_dtype("fp16"), parts=2, shards=2)
    code = (
        "import os, signal, sys\n"
        "from metaseq_api.cli.reshard import main\n"
        "real, calls = os.pwrite, []\n"
        "def kill(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 60: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "os.pwrite = kill\n"
        f"main([{str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}, '--parts', '4', '--num-threads', '2'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_env(OMP_NUM_THREADS="1"), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path / "out")
    assert [name for name in left if name.endswith(".partial")]
    for name in left:
        if name.endswith(".pt"):
            assert len(load(tmp_path / "out" / name)["model"]) > 20
    assert run(tmp_path / "in", tmp_path / "out", "--parts", "4") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [f"reshard-model_part-{j}.pt" for j in range(4)]
    assert_holds(tmp_path / "out", logical_weights(fused_weights(with_dtype("fp16"))))


def test_where_one_file_fails_the_others_being_written_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "in", with_dtype("fp16"), parts=1, shards=1)
    real, both, failed = write._fill, threading.Barrier(2, timeout=30), threading.Event()

    def fill(*args: Any) -> Any:
        if not failed.is_set():
            both.wait()  # two files are being written
            if not failed.is_set() and threading.current_thread().name.endswith("_0"):
                failed.set()
                raise OSError(28, "full")
            failed.wait(30)
        return real(*args)

    monkeypatch.setattr(write, "_fill", fill)
    assert run(tmp_path / "in", tmp_path / "out", "--parts", "4", "--num-threads", "2") == 8
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".partial")]
    assert len(os.listdir(tmp_path / "out")) < 2


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--parts", "3"], 6, "--parts 3 does not divide"),
        (["--shards", "2", "--flat", "False"], 2, "--flat"),
        (["--shards", "0"], 2, "--shards: '0' is not a number from 1 on"),
        (["--to", "hugging-face", "--parts", "2"], 2, "--to hugging-face has --max-file-gb"),
        (["--vocab-filename", "x.json"], 7, "(BPE_VOCAB) names x.json"),
    ],
)
def test_bad_input_is_one_line_and_a_code_and_nothing_written(
    more: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", parts=1, shards=1)
    assert run(tmp_path / "in", tmp_path / "out", *more) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_cut_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "in", parts=1, shards=1)
    assert run(tmp_path / "in", tmp_path / "out", "--parts", "4") == 0
    before = sorted(os.listdir(tmp_path / "out"))
    for others in (["--parts", "2"], ["--parts", "4", "--shards", "2"]):
        assert run(tmp_path / "in", tmp_path / "out", *others) == 2
        assert (
            f"out holds reshard-model_part-{2 if len(others) == 2 else 0}.pt of another job" in capsys.readouterr().err
        )
        assert sorted(os.listdir(tmp_path / "out")) == before
    assert run(tmp_path / "in", tmp_path / "out", "--parts", "4") == 0


def test_the_folder_of_the_source_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "in", parts=1, shards=1)
    before = os.listdir(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "in", "--parts", "2") == 2
    assert "name another folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "in") == before
