"""Any checkpoint becomes a folder that transformers loads, with the same numbers in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from metaseq_api.scripts.to_hugging_face import main
from support import tiny_tokenizer
from support.checkpoints import TINY, fused_weights, logical_weights, with_dtype, write_shards
from support.hf_opt import VARIANTS, logits, metaseq_weights, tiny_opt
from support.processes import clean_env
from support.steps import Driver
from transformers import AutoTokenizer, OPTForCausalLM

from metaseq_api.checkpoint import open_checkpoint, to_hugging_face
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.trainer import write_trainer_checkpoint
from metaseq_api.core.config import ModelConfig
from metaseq_api.errors import CheckpointMismatch
from metaseq_api.model.weights import RandomWeights
from metaseq_api.tokenizer import Tokenizer, find_files

DATA = Path(__file__).parents[3] / "shared" / "data"
PROMPT = [2, 5, 6, 7, 3, 9, 11]


def convert(source: Path, target: Path, *more: str) -> OPTForCausalLM:
    assert main(["--input", str(source), "--output", str(target), *more]) == 0
    model, report = OPTForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"tied_output": False}])
@pytest.mark.parametrize(("parts", "shards"), [(2, 3), (1, 1)])
def test_raw_shards_become_a_model_with_our_logits(
    changes: dict[str, Any], parts: int, shards: int, tmp_path: Path
) -> None:
    write_shards(tmp_path / "in", with_dtype("fp32", **changes), parts=parts, shards=shards)
    model = convert(tmp_path / "in", tmp_path / "out")
    ours = open_checkpoint(tmp_path / "in")
    (got,) = Driver(ours.config, ours).step((PROMPT, 0, [3]))
    torch.testing.assert_close(got, logits(model, PROMPT), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"tied_output": False}])
def test_a_round_trip_ends_bit_equal(dtype: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = with_dtype(dtype, **changes)
    write_shards(tmp_path / "in", config, parts=2, shards=2)
    model = convert(tmp_path / "in", tmp_path / "out")
    assert model.dtype == DTYPES[dtype]
    back = open_checkpoint(tmp_path / "out")
    assert back.config == open_checkpoint(tmp_path / "in").config
    wanted = logical_weights(fused_weights(config))
    assert set(back.names()) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(back.tensor(name).read_all(), tensor)
    for name, tensor in metaseq_weights(model).items():
        assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_350ms_lone_file_goes_there_and_back(dtype: str, tmp_path: Path) -> None:
    wanted = metaseq_weights(tiny_opt("350m").to(DTYPES[dtype]))
    (tmp_path / "in").mkdir()
    cfg = {"model": Namespace(decoder_attention_heads=4, decoder_normalize_before=False, activation_fn="relu")}
    torch.save({"cfg": cfg, "model": wanted}, tmp_path / "in" / "reshard.pt")
    model = convert(tmp_path / "in", tmp_path / "out")
    assert model.dtype == DTYPES[dtype]
    for source in (metaseq_weights(model), read(tmp_path / "out")):
        assert set(source) == set(wanted)
        assert all(torch.equal(source[name], tensor) for name, tensor in wanted.items())
    ours = open_checkpoint(tmp_path / "out")
    (got,) = Driver(ours.config, ours).step((PROMPT, 0, [3]))
    torch.testing.assert_close(got, logits(model.float(), PROMPT), atol=1e-4, rtol=0)


def read(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name).read_all() for name in checkpoint.names()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_to_hugging_face_keeps_every_variant(variant: str, tmp_path: Path) -> None:
    model = tiny_opt(variant)
    model.save_pretrained(tmp_path / "in")
    found = convert(tmp_path / "in", tmp_path / "out", "--max-file-gb", "0.00005")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert {k: v for k, v in found.config.to_dict().items() if k != "dropout"} == {
        k: v for k, v in OPTForCausalLM.from_pretrained(tmp_path / "in").config.to_dict().items() if k != "dropout"
    } | {"_name_or_path": str(tmp_path / "out")}
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_another_dtype_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", with_dtype("fp32"), parts=2, shards=1)
    model = convert(tmp_path / "in", tmp_path / "out", "--output-dtype", "bf16")
    assert model.dtype == torch.bfloat16
    embed = fused_weights(with_dtype("fp32"))["decoder.embed_tokens.weight"].bfloat16()
    assert torch.equal(model.model.decoder.embed_tokens.weight, embed)


def test_what_is_written_generates_and_its_tokenizer_puts_the_end_of_text_in_front(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip("OPT's tokenizer files are not here")
    config = ModelConfig(
        num_layers=1, hidden_dim=8, num_heads=2, ffn_dim=8, vocab_size=50272, max_positions=16, dtype="fp32"
    )
    weights = {name: RandomWeights(config).tensor(name).value for name in RandomWeights(config).names()}
    fused = {n.replace("k_proj", "qkv_proj"): t for n, t in weights.items() if "q_proj" not in n and "v_proj" not in n}
    for name in [n for n in fused if "qkv_proj" in n]:
        fused[name] = torch.cat([weights[name.replace("qkv_proj", f"{x}_proj")] for x in "kvq"])
    write_trainer_checkpoint(tmp_path / "in", fused, config, num_parts=1, num_shards=2, dtype=torch.float32)
    flags = ["--vocab-filename", str(DATA / "gpt2-vocab.json"), "--merges-filename", str(DATA / "gpt2-merges.txt")]
    model = convert(tmp_path / "in", tmp_path / "out", *flags)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The man turned on the faucet"
    ids = tokenizer(text)["input_ids"]
    vocab, merges = find_files(tmp_path / "out", None, None)
    assert ids == [2, *Tokenizer.load(vocab, merges, model_vocab_size=50272).encode(text)]
    out = model.generate(torch.tensor([ids]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, len(ids) + 3)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert find_files(tmp_path / "saved", None, None) == (tmp_path / "saved" / "tokenizer.json",) * 2


def test_a_tokenizer_json_is_taken_along(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", with_dtype("fp16", vocab_size=tiny_tokenizer.VOCAB_SIZE), parts=1, shards=1)
    vocab, merges = tiny_tokenizer.write(tmp_path)
    pairs = [line.split(" ") for line in merges.read_text("utf-8").splitlines()[1:]]
    tokens = {"model": {"type": "BPE", "vocab": json.loads(vocab.read_text("utf-8")), "merges": pairs}}
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(tokens))
    vocab.unlink()
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()


def test_the_door_runs_as_a_module_and_shows_progress(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", parts=2, shards=2)
    argv = [sys.executable, "-m", "metaseq_api.scripts.to_hugging_face"]
    argv += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = subprocess.run(argv, env=clean_env(OMP_NUM_THREADS="1"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100 %" in done.stderr
    assert "the model is written without" in done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == sorted(
        os.listdir(tmp_path / "out"), key=["model.safetensors", "generation_config.json", "config.json"].index
    )


def test_memory_is_bounded_by_a_block_not_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_dtype("fp32", vocab_size=4096)
    write_shards(tmp_path / "in", config, parts=2, shards=2)
    sizes: list[int] = []
    monkeypatch.setattr(to_hugging_face, "CHUNK", 4096)
    put = to_hugging_face.put

    def measured(file: int, at: int, chunk: torch.Tensor, progress: Any) -> int:
        sizes.append(chunk.numel() * chunk.itemsize)
        return put(file, at, chunk, progress)

    monkeypatch.setattr(to_hugging_face, "put", measured)
    convert(tmp_path / "in", tmp_path / "out")
    header, *blocks = sizes[:-2]  # the last two are the configs
    assert sum(blocks) > 64 * 4096 + header
    assert max(blocks) <= 4096


@pytest.mark.parametrize("found", ["config.json", "notes.txt", "reshard.pt"])
def test_a_folder_with_something_in_it_is_left_alone(
    found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", parts=1, shards=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / found).write_text("mine")
    assert main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    assert f"it holds {found}; name a new folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == [found]
    assert (tmp_path / "out" / found).read_text() == "mine"


def test_a_run_that_broke_off_leaves_no_model_and_the_next_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", parts=1, shards=2)
    argv = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-file-gb", "0.000002"]
    real, calls = os.pwrite, []

    def full(file: int, data: Any, at: int) -> int:
        calls.append(at)
        if len(calls) > 30:
            raise OSError(28, "No space left on device")
        return real(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert main(argv) == 8
    assert "the disk is full while writing" in capsys.readouterr().err
    left = os.listdir(tmp_path / "out")
    assert left
    assert "config.json" not in left
    assert not [name for name in left if name.endswith(".partial")]
    (tmp_path / "out" / "model-00001-of-00099.safetensors").touch()
    (tmp_path / "out" / "model-00002-of-00099.safetensors.partial").touch()
    convert(tmp_path / "in", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--max-file-gb", "0"], 2, "must be more than 0"),
        (["--max-file-gb", "nan"], 2, "must be more than 0"),
        (["--vocab-filename", "x.json"], 7, "(BPE_VOCAB) names x.json"),
        (["--input", "/nowhere/at/all"], 3, "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    more: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", parts=1, shards=1)
    assert main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *more]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_shape_that_hugging_face_has_not_is_refused(tmp_path: Path) -> None:
    config = with_dtype("fp16", pre_norm=False)
    with pytest.raises(CheckpointMismatch, match="no Hugging Face OPT has"):
        to_hugging_face.their_config(config)
    assert to_hugging_face.their_config(TINY)["_remove_final_layer_norm"] is False
