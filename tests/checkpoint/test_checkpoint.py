"""A folder of FSDP shards or of parts is the model that was written, whichever way it is cut and read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    LAYOUTS,
    TINY,
    consolidated,
    edit,
    fused_weights,
    load,
    logical_weights,
    with_dtype,
    write_shards,
)

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.folder import collect, find, numbers, with_numbers
from metaseq_api.checkpoint.trainer import split_part
from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound


def write_parts(folder: Path, parts: int, name: str = "reshard-model_part-{}.pt", **changes: Any) -> list[Path]:
    """Unflattened parts, as metaseq's reshard scripts leave them, without metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(TINY, dtype="fp16", **changes)
    paths = []
    for part in range(parts):
        weights = split_part(fused_weights(config), part, parts)
        path = folder / name.format(part)
        cfg = {"model": {"decoder_attention_heads": 4}}
        torch.save({"model": {k: v.clone() for k, v in weights.items()}, "cfg": cfg}, path)
        paths.append(path)
    return paths


@pytest.mark.parametrize(("parts", "shards"), LAYOUTS)
def test_every_slice_of_every_tensor_is_that_of_the_whole_model(parts: int, shards: int, tmp_path: Path) -> None:
    write_shards(tmp_path, parts=parts, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    whole = logical_weights(fused_weights(with_dtype("fp16")))
    assert (checkpoint.num_parts, checkpoint.num_shards) == (parts, shards)
    assert checkpoint.config == with_dtype("fp16")
    assert set(checkpoint.names()) == set(whole)
    assert checkpoint.num_bytes == 2 * sum(t.numel() for t in whole.values())
    for name, tensor in whole.items():
        stored = checkpoint.tensor(name)
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), torch.float16)
        for dim, size in enumerate(tensor.shape):
            for ranks in (1, 2, 4):
                for rank in range(ranks if size % ranks == 0 else 0):
                    start, stop = rank * size // ranks, (rank + 1) * size // ranks
                    assert torch.equal(stored.read(dim, start, stop), tensor.narrow(dim, start, stop - start)), name
            assert torch.equal(stored.read(dim, 1, size - 2), tensor.narrow(dim, 1, size - 3)), name
            assert stored.read(dim, 3, 3).numel() == 0


@pytest.mark.parametrize(("parts", "shards"), LAYOUTS)
def test_parts_are_what_fairscale_makes_of_the_same_shards(parts: int, shards: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=parts, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    for part in range(parts):
        oracle = consolidated(paths[part * shards : (part + 1) * shards])
        tensors = checkpoint.parts[part].tensors
        assert set(oracle) == {*tensors, "decoder.version"}
        for name, tensor in tensors.items():
            flat = torch.cat(list(tensor.flat(0, tensor.numel)))
            assert torch.equal(flat.view(tensor.shape), oracle[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_numbers_come_in_the_dtype_they_are_stored_in(dtype: str, tmp_path: Path) -> None:
    write_shards(tmp_path, with_dtype(dtype), parts=2, shards=3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.dtype == dtype
    for name, tensor in logical_weights(fused_weights(with_dtype(dtype))).items():
        assert torch.equal(checkpoint.tensor(name).read_all(), tensor)


def test_an_untied_output_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    config = with_dtype("fp16", tied_output=False)
    write_shards(tmp_path, config, parts=2, shards=3)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tied_output
    stored = checkpoint.tensor("decoder.output_projection.weight")
    assert torch.equal(stored.read_all(), fused_weights(config)["decoder.output_projection.weight"])


def test_what_is_read_can_be_written_to_without_touching_the_file(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, parts=1, shards=1)
    before = path.read_bytes()
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.tensor("decoder.layer_norm.bias").read_all().zero_()
    assert checkpoint.tensor("decoder.layer_norm.bias").read_all().abs().min() > 0
    assert path.read_bytes() == before


def test_moments_land_on_the_parameter_they_belong_to(tmp_path: Path) -> None:
    write_shards(tmp_path, parts=2, shards=7)
    moments = open_checkpoint(tmp_path).moments()
    assert set(moments) == {"exp_avg", "exp_avg_sq"}
    for name, tensor in logical_weights(fused_weights(with_dtype("fp16"))).items():
        assert torch.equal(moments["exp_avg"][name].read_all(), tensor.float() / 4)
        assert torch.equal(moments["exp_avg_sq"][name].read_all(), tensor.float().square())


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", ["reshard-model_part-{}.pt", "checkpoint_1_4000.pt-model_part-{}.pt"])
def test_unflattened_parts_are_read_without_metadata(parts: int, name: str, tmp_path: Path) -> None:
    write_parts(tmp_path, parts, name)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == with_dtype("fp16")
    for key, tensor in logical_weights(fused_weights(with_dtype("fp16"))).items():
        assert torch.equal(checkpoint.tensor(key).read_all(), tensor)


def test_350m_is_known_by_its_shapes(tmp_path: Path) -> None:
    weights = logical_weights(fused_weights(with_dtype("fp16")))
    weights = {name: t for name, t in weights.items() if not name.startswith("decoder.layer_norm")}
    weights["decoder.embed_tokens.weight"] = torch.randn(24, 8).half()
    weights["decoder.project_in_dim.weight"] = torch.randn(16, 8).half()
    weights["decoder.project_out_dim.weight"] = torch.randn(8, 16).half()
    model = {"decoder_attention_heads": 4, "decoder_normalize_before": False, "activation_fn": "relu"}
    torch.save({"model": weights, "cfg": {"model": model}}, tmp_path / "reshard.pt")
    checkpoint = open_checkpoint(tmp_path / "reshard.pt")
    assert checkpoint.config == with_dtype("fp16", embed_dim=8, pre_norm=False, final_norm=False)
    assert torch.equal(
        checkpoint.tensor("decoder.project_in_dim.weight").read_all(), weights["decoder.project_in_dim.weight"]
    )


def test_heads_come_from_the_published_size_where_cfg_is_silent(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, 1)
    edit(path, lambda state: state.pop("cfg"))
    with pytest.raises(CheckpointMismatch, match="how many attention heads its 2 layers of width 16"):
        open_checkpoint(tmp_path)
    assert OPT_SHAPES["opt-125m"].num_heads == 12


def test_a_bare_state_dict_is_a_checkpoint_too(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, 1)
    edit(path, lambda state: (state.update(state.pop("model")), state.pop("cfg")))
    with pytest.raises(CheckpointMismatch, match="attention heads"):  # all else was understood
        open_checkpoint(tmp_path)


def test_an_output_projection_stored_beside_its_embedding_is_tied(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, 1)
    edit(
        path,
        lambda s: s["model"].update({"decoder.output_projection.weight": s["model"]["decoder.embed_tokens.weight"]}),
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tied_output
    assert "decoder.output_projection.weight" not in checkpoint.names()


# ------------------------------------------------------------------------------------------------------- finding files


def test_names_are_taken_apart_from_the_right() -> None:
    assert numbers(Path("checkpoint_1_4000.pt-model_part-1.pt")) == ("checkpoint_1_4000.pt", 1, None)
    assert numbers(Path("a/checkpoint_last-model_part-3-shard12.pt")) == ("checkpoint_last", 3, 12)
    assert numbers(Path("reshard.pt")) == ("reshard", None, None)
    path = Path("d.pt/x.pt-model_part-3-shard12.pt")
    assert with_numbers(path, part=0, shard=5) == Path("d.pt/x.pt-model_part-0-shard5.pt")


def test_metaseqs_model_file_stands_for_its_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 2)
    assert find(tmp_path / "reshard.pt").files == ((paths[0],), (paths[1],))
    assert find(paths[1]) == find(tmp_path)


def test_a_folder_with_shards_and_parts_serves_the_parts(tmp_path: Path) -> None:
    write_shards(tmp_path, parts=2, shards=2)
    write_parts(tmp_path, 2)
    assert find(tmp_path).prefix == "reshard"
    assert find(tmp_path / "checkpoint_last.pt").num_shards == 2


def test_a_folder_with_several_checkpoints_asks_which(tmp_path: Path) -> None:
    for update in (10, 20):
        write_shards(tmp_path, parts=1, shards=1, prefix=f"checkpoint_{update}")
    with pytest.raises(CheckpointMismatch, match=r"several checkpoints.*checkpoint_10.*checkpoint_20.*name one"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "checkpoint_20.pt").num_shards == 1


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"holds no \.pt file"):
        find(tmp_path)
    with pytest.raises(CheckpointNotFound, match="nowhere does not exist"):
        find(tmp_path / "nowhere" / "reshard.pt")
    write_parts(tmp_path, 1)
    with pytest.raises(CheckpointNotFound, match=r"other\.pt does not exist.*reshard\.pt"):
        find(tmp_path / "other.pt")


def test_files_with_one_number_are_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="same part and shard"):
        collect([Path("a/x-shard0.pt"), Path("b/x-shard0.pt")])


# ------------------------------------------------------------------------------------------------- what is not in order


@pytest.mark.parametrize("gone", [(0, 1), (1, 0), (1, 2), (0, 0)])
def test_a_missing_shard_is_named(gone: tuple[int, int], tmp_path: Path) -> None:
    write_shards(tmp_path, parts=2, shards=3)
    path = tmp_path / "checkpoint_last-model_part-{}-shard{}.pt".format(*gone)
    path.unlink()
    with pytest.raises(CheckpointNotFound, match=f"{path.name} is missing"):
        open_checkpoint(tmp_path)


def test_the_last_shard_of_every_part_is_missed_by_its_numbers(tmp_path: Path) -> None:
    write_shards(tmp_path, parts=2, shards=3)
    for part in range(2):
        (tmp_path / f"checkpoint_last-model_part-{part}-shard2.pt").unlink()
    with pytest.raises(CheckpointNotFound, match=r"part-0-shard2\.pt is missing: 2 shards hold \d+ of the \d+"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("flat", [True, False])
def test_the_last_part_is_missed_by_the_shapes(flat: bool, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=2, shards=1) if flat else write_parts(tmp_path, 2)
    paths[1].unlink()
    with pytest.raises(CheckpointNotFound, match=f"{paths[1].name} is missing.*split over 2 parts, and 1 was found"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("foreign", [0, 1, 2, 3])
def test_a_part_of_another_model_is_named(foreign: int, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 4)
    others = write_parts(tmp_path / "other", 4, ffn_dim=64)
    others[foreign].replace(paths[foreign])
    with pytest.raises(CheckpointMismatch, match=rf"part-{foreign}\.pt is of another model than"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("foreign", [1, 3, 5])
def test_a_shard_of_another_model_or_dtype_is_named(foreign: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=2, shards=3)
    others = write_shards(tmp_path / "other", with_dtype("bf16"), parts=2, shards=3)
    others[foreign].replace(paths[foreign])
    with pytest.raises(CheckpointMismatch, match=f"{paths[foreign].name} is of another model than"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("foreign", [0, 4])
def test_a_shard_of_another_moment_is_named(foreign: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=2, shards=3)
    others = write_shards(tmp_path / "other", parts=2, shards=3, num_updates=2000)
    others[foreign].replace(paths[foreign])
    with pytest.raises(
        CheckpointMismatch, match=rf"{paths[foreign].name} was saved at another update than .*\(2000 instead of 1000\)"
    ):
        open_checkpoint(tmp_path)


def test_shards_under_each_others_names_are_caught_by_their_padding(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=7)
    first, last = paths[0].read_bytes(), paths[-1].read_bytes()
    paths[0].write_bytes(last)
    paths[-1].write_bytes(first)
    with pytest.raises(CheckpointMismatch, match=r"shard\d\.pt holds \d+ numbers of .*the shards' names or number"):
        open_checkpoint(tmp_path)


def test_a_shard_cut_off_in_the_middle_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=2, shards=2)
    paths[2].write_bytes(paths[2].read_bytes()[:-500])
    with pytest.raises(CheckpointCorrupt, match=f"{paths[2].name} .*; fetch"):
        open_checkpoint(tmp_path)


def _drop_layer(state: dict[str, Any]) -> None:
    for name in [n for n in state["model"] if "layers.1.fc1" in n]:
        del state["model"][name]


def _unknown(state: dict[str, Any]) -> None:
    state["model"]["decoder.layers.0.experts.0.weight"] = torch.zeros(2)


def _wrong_shape(state: dict[str, Any]) -> None:
    state["model"]["decoder.layers.1.fc2.weight"] = torch.zeros(16, 16).half()


def _no_layers(state: dict[str, Any]) -> None:
    state["model"] = {n: t for n, t in state["model"].items() if "layers" not in n}


def _odd_thirds(state: dict[str, Any]) -> None:
    state["model"]["decoder.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(47).half()


def _integers(state: dict[str, Any]) -> None:
    state["model"] = {n: t.long() for n, t in state["model"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_layer, "no tensor for decoder.layers.1.fc1.bias"),
        (_unknown, r"reshard-model_part-0\.pt: .*decoder\.layers\.0\.experts\.0\.weight is in no OPT"),
        (_wrong_shape, "16 x 16 for decoder.layers.1.fc2.weight"),
        (_no_layers, "no layers"),
        (_odd_thirds, "three equal thirds"),
        (_integers, "torch.int64"),
        (lambda s: s.update(model={}), "holds no model"),
        (lambda s: s.update(model=[1]), "holds no model"),
        (lambda s: s["model"].pop("decoder.embed_tokens.weight"), "no tensor decoder.embed_tokens.weight"),
        (lambda s: s["cfg"]["model"].update(decoder_attention_heads=5), "attention heads"),
    ],
)
def test_weights_that_are_not_an_opts_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    (path,) = write_parts(tmp_path, 1)
    edit(path, change)
    with pytest.raises((CheckpointMismatch, CheckpointCorrupt), match=message):
        open_checkpoint(tmp_path)


def test_flat_parameters_without_metadata_are_refused_by_name(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, parts=1, shards=1)
    edit(path, lambda state: (state.pop("shard_metadata"), state.pop("cfg")))
    with pytest.raises(CheckpointMismatch, match=f"{path.name} holds flat parameters without shard_metadata"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_metadata_does_not_explain_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, parts=1, shards=1)
    edit(path, lambda state: state["model"].update({"decoder.adapter.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointMismatch, match=r"decoder\.adapter\.weight, which its metadata does not explain"):
        open_checkpoint(tmp_path)


def test_our_files_are_as_the_trainer_leaves_them(tmp_path: Path) -> None:
    state = load(write_shards(tmp_path, parts=2, shards=2)[3])
    assert type(state["cfg"]["model"]).__name__ == "Namespace"
    assert list(state["model"]) == [
        "flat_param_0",
        "decoder.version",
        "decoder.layers.0.flat_param_0",
        "decoder.layers.1.flat_param_0",
    ]
    assert set(state) == {
        "cfg",
        "model",
        "criterion",
        "optimizer_history",
        "task_state",
        "extra_state",
        "last_optimizer_state",
        "shard_metadata",
    }
    assert state["shard_metadata"]["param_metadata"][0]["shared_param_info"] == [
        ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
    ]
