"""Folders that transformers saved are read as they are, and hold the same numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.hf_opt import VARIANTS, config_of, logits, metaseq_weights, tiny_opt
from support.steps import Driver
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTForCausalLM

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.hugging_face import our_name, their_name
from metaseq_api.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointNotFound

PROMPT = [2, *range(10, 40)]


def check_same(folder: Path, wanted: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(wanted)
    for name, tensor in wanted.items():
        found = checkpoint.tensor(name)
        assert torch.equal(found.read_all(), tensor)
        assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))


def save_bin(model: OPTForCausalLM, folder: Path, *, files: int = 1, names: Callable[[str], str] = str) -> None:
    """As transformers did until 2023: with torch.save, the tied head included."""
    model.config.save_pretrained(folder)
    state = {names(name): tensor for name, tensor in model.state_dict().items()}
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{i % files + 1:05}-of-{files:05}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_read_bit_for_bit_and_its_config_with_it(variant: str, tmp_path: Path) -> None:
    model = tiny_opt(variant)
    model.save_pretrained(tmp_path)
    check_same(tmp_path, metaseq_weights(model))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config_of(model)
    assert (checkpoint.layout, checkpoint.num_parts, checkpoint.num_shards) == ("Hugging Face, safetensors", 1, 1)
    assert checkpoint.num_bytes == sum(t.nbytes for t in metaseq_weights(model).values())


@pytest.mark.parametrize("variant", ["pre-norm", "350m", "gelu"])
def test_our_model_gives_hugging_faces_logits_from_the_folder(variant: str, tmp_path: Path) -> None:
    model = tiny_opt(variant)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_shards > 2
    (got,) = Driver(checkpoint.config, checkpoint).step((PROMPT, 0, [9, 3, 4, 20]))
    torch.testing.assert_close(got, logits(model, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["", "model.safetensors", "config.json", "reshard.pt"])
def test_the_folder_may_be_named_by_a_file_in_it(name: str, tmp_path: Path) -> None:
    tiny_opt("pre-norm").save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path / name).layout == "Hugging Face, safetensors"


def test_a_name_of_nothing_in_the_folder_is_not_the_folder(tmp_path: Path) -> None:
    tiny_opt("pre-norm").save_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("variant", ["pre-norm", "350m"])
def test_a_model_saved_without_its_head_is_read(variant: str, tmp_path: Path) -> None:
    model = tiny_opt(variant)
    model.model.save_pretrained(tmp_path)
    check_same(tmp_path, metaseq_weights(model))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("names", [str, lambda name: name.removeprefix("model.")])
def test_bin_files_are_read_without_torch_load(
    files: int, names: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_opt("350m").half()
    save_bin(model, tmp_path, files=files, names=names)
    monkeypatch.delattr(torch, "load")
    check_same(tmp_path, metaseq_weights(model))
    assert open_checkpoint(tmp_path).layout == "Hugging Face, bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_metas_first_uploads_are_read(zipped: bool, tmp_path: Path) -> None:
    """fp16, the tied head stored as well, a version mark, names of either form, no word of later options."""
    model = tiny_opt("350m").half()
    save_bin(model, tmp_path)
    state = model.state_dict() | {"model.decoder.version": torch.tensor([3.0])}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    later = ("enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm", "tie_word_embeddings", "dtype")
    change_config(tmp_path, lambda c: ([c.pop(key, None) for key in later], c.update(torch_dtype="float16")))
    check_same(tmp_path, metaseq_weights(model))
    assert open_checkpoint(tmp_path).config.dtype == "fp16"


@pytest.mark.parametrize("drop", ["lm_head.weight", "model.decoder.embed_tokens.weight", None])
def test_a_tied_table_is_read_under_either_name_or_both(drop: str | None, tmp_path: Path) -> None:
    model = tiny_opt("pre-norm")
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != drop}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path, metadata={"format": "pt", drop or "from": "the other"})
    check_same(tmp_path, metaseq_weights(model))
    if drop:
        safetensors.torch.save_model(model, str(path))
        check_same(tmp_path, metaseq_weights(model))


@pytest.mark.parametrize("affine", [True, False])
def test_galactica_is_refused_for_its_activation(affine: bool, tmp_path: Path) -> None:
    """An OPT by its type, with the exact gelu and without biases."""
    config = tiny_opt("pre-norm").config
    config.activation_function, config.enable_bias, config.layer_norm_elementwise_affine = "gelu", False, affine
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match="has the activation 'gelu'; relu, "):
        open_checkpoint(tmp_path)


def test_a_payload_in_a_bin_file_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/mark",)

    model = tiny_opt("pre-norm")
    model.config.save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "lm_head.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("variant", ["pre-norm", "350m"])
def test_an_output_that_is_not_tied_is_a_tensor_of_its_own(variant: str, tmp_path: Path) -> None:
    model = tiny_opt(variant)
    model.config.tie_word_embeddings = False
    own = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    model.lm_head.weight = torch.nn.Parameter(own)
    model.save_pretrained(tmp_path)
    check_same(tmp_path, metaseq_weights(model) | {"decoder.output_projection.weight": own})
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tied_output
    (got,) = Driver(checkpoint.config, checkpoint).step((PROMPT, 0, [9, 3, 4, 20]))
    torch.testing.assert_close(got, logits(model, PROMPT), atol=1e-4, rtol=0)


def test_models_without_biases_or_a_last_norm_are_read(tmp_path: Path) -> None:
    model = tiny_opt("pre-norm")
    model.config.enable_bias, model.config._remove_final_layer_norm = False, True
    model = OPTForCausalLM(model.config).eval()
    model.save_pretrained(tmp_path)
    config = open_checkpoint(tmp_path).config
    assert (config.bias, config.final_norm, config.pre_norm) == (False, False, True)
    check_same(tmp_path, metaseq_weights(model))


@pytest.mark.parametrize(
    ("stored", "key", "said", "wanted"),
    [
        (torch.float16, "torch_dtype", "float16", "fp16"),
        (torch.bfloat16, "dtype", "bfloat16", "bf16"),
        (torch.float32, "dtype", "float16", "fp16"),
        (torch.bfloat16, "dtype", None, "bf16"),
        (torch.float16, "dtype", "auto", "fp16"),
    ],
)
def test_the_dtype_is_what_the_config_says_else_what_is_stored(
    stored: torch.dtype, key: str, said: str | None, wanted: str, tmp_path: Path
) -> None:
    tiny_opt("pre-norm").to(stored).save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: (config.pop("dtype"), config.update({key: said} if said else {})))
    assert open_checkpoint(tmp_path).config.dtype == wanted


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_reads_only_its_bytes(dim: int, tmp_path: Path) -> None:
    model = tiny_opt("pre-norm")
    model.save_pretrained(tmp_path)
    tensor = open_checkpoint(tmp_path).tensor("decoder.layers.1.fc2.weight")
    whole = metaseq_weights(model)["decoder.layers.1.fc2.weight"]
    half = whole.shape[dim] // 2
    assert torch.equal(tensor.read(dim, half, half + 5), whole.narrow(dim, half, 5))
    assert torch.equal(tensor.box(range(3, 9), range(1, 6)), whole[3:9, 1:6])


def test_another_model_is_refused_by_its_name(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"config\.json is of model_type 'gpt2'; only OPT"):
        open_checkpoint(tmp_path)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 32}, "hidden_size, and its config says 32"),
    ({"num_hidden_layers": 3}, "num_hidden_layers, and its config says 3"),
    ({"num_attention_heads": 5}, "does not say how many attention heads"),
    ({"num_attention_heads": "4"}, "does not say how many attention heads"),
    ({"num_attention_heads": None}, "does not say how many attention heads"),
    ({"activation_function": "gelu"}, "has the activation 'gelu'"),
    ({"activation_function": []}, "has the activation"),
    ({"do_layer_norm_before": False}, r"has \(64,\) for decoder.layer_norm.bias"),
    ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ({"tie_word_embeddings": False}, None),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_a_config_of_another_model_is_refused(change: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    tiny_opt("pre-norm").save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config.update(change))
    if words is None:  # nothing was saved under the head's name, so that it is the embedding after all
        assert open_checkpoint(tmp_path).config.tied_output
        return
    with pytest.raises(CheckpointMismatch, match=words) as found:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(found.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_opt("pre-norm").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.txt", 3, None])
def test_an_index_names_files_of_its_folder_alone(place: Any, sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.decoder.embed_tokens.weight"] = place
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointCorrupt, match="has no weight_map of file names"):
        open_checkpoint(sharded)


def test_a_missing_or_doubled_file_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    copy = file.read_bytes()
    file.unlink()
    with pytest.raises(CheckpointNotFound, match=file.name):
        open_checkpoint(sharded)
    file.write_bytes(copy)
    shutil.copy(file, sorted(sharded.glob("model-*.safetensors"))[0])
    with pytest.raises(CheckpointMismatch, match="is there twice"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", '"', "[" * 100_000, "\udcff"])
def test_json_that_is_none_is_named(text: str, sharded: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        good = (sharded / name).read_bytes()
        (sharded / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointCorrupt, match=name):
            open_checkpoint(sharded)
        (sharded / name).write_bytes(good)


def test_a_folder_with_a_config_and_no_known_weights_says_what_it_looks_for(tmp_path: Path) -> None:
    tiny_opt("pre-norm").config.save_pretrained(tmp_path)
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(CheckpointNotFound, match=r"none of model\.safetensors, "):
        open_checkpoint(tmp_path)


def test_names_go_there_and_back(tmp_path: Path) -> None:
    for variant in ("pre-norm", "350m"):
        model = tiny_opt(variant)
        ours = set(metaseq_weights(model)) | {"decoder.output_projection.weight"}
        assert {their_name(name) for name in ours} == set(model.state_dict())
        assert {our_name(their_name(name)) for name in ours} == ours
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), OPTForCausalLM)
