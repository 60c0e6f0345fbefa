"""Any cut to any other, and back, bit for bit; what the files say of themselves stays true."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYOUTS, consolidated, edit, fused_weights, load, same, with_dtype, write_shards

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.reshard import reshard_fsdp, reshard_mp
from metaseq_api.checkpoint.trainer import split_part
from metaseq_api.errors import CheckpointMismatch, CheckpointNotFound, ParallelSizeError, SettingsError

FLAT = Form(unflatten=False)
WHOLE = Form()
TIED = "decoder.output_projection.weight"


def join(paths: list[Path], folder: Path, parts: int, form: Form = WHOLE) -> list[Path]:
    shards = len(paths) // parts
    return [
        reshard_fsdp(paths[j * shards : (j + 1) * shards], f"{folder}/reshard-model_part-{j}.pt", form=form)[0]
        for j in range(parts)
    ]


@pytest.mark.parametrize(("parts", "shards"), LAYOUTS)
def test_joined_shards_are_what_fairscale_makes_of_them(parts: int, shards: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=parts, shards=shards)
    for part, joined in enumerate(join(paths, tmp_path / "out", parts)):
        state, oracle = load(joined), consolidated(paths[part * shards : (part + 1) * shards])
        assert set(state["model"]) == {*oracle, TIED}  # fairscale forgets the shared one under nested wrapping
        assert all(same(state["model"][name], tensor) for name, tensor in oracle.items())
        assert same(state["model"][TIED], oracle["decoder.embed_tokens.weight"])


@pytest.mark.parametrize(("parts", "shards"), LAYOUTS)
def test_joined_and_cut_again_the_shards_are_those_of_the_trainer(parts: int, shards: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", parts=parts, shards=shards)
    for part, joined in enumerate(join(paths, tmp_path / "whole", parts)):
        again = reshard_fsdp([joined], f"{tmp_path}/out/{part}-shard{{i}}.pt", num_output_shards=shards, form=FLAT)
        for before, after in zip(paths[part * shards : (part + 1) * shards], again, strict=True):
            old, new = load(before), load(after)
            for key in ("model", "shard_metadata", "last_optimizer_state"):
                assert same(old[key], new[key]), (after, key)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 7), (7, 2), (5, 124)])
def test_any_number_of_shards_becomes_any_other(before: int, after: int, tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", parts=1, shards=before)
    want = write_shards(tmp_path / "want", parts=1, shards=after)
    got = reshard_fsdp(paths, f"{tmp_path}/out/x-shard{{i}}.pt", num_output_shards=after, form=FLAT)
    for path, wanted in zip(got, want, strict=True):
        old, new = load(wanted), load(path)
        for key in ("model", "shard_metadata", "last_optimizer_state"):
            assert same(old[key], new[key]), (path, key)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 1), (2, 4), (4, 2), (4, 4)])
def test_any_number_of_parts_becomes_any_other(before: int, after: int, tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=before, shards=3), tmp_path / "whole", before)
    want = join(write_shards(tmp_path / "want", parts=after, shards=1), tmp_path / "want", after)
    got = reshard_mp(paths, f"{tmp_path}/out/reshard-model_part-{{i}}.pt", num_output_parts=after, form=WHOLE)
    for path, wanted in zip(got, want, strict=True):
        old, new = load(wanted), load(path)
        assert set(old) == set(new)
        for key in ("model", "shard_metadata", "last_optimizer_state", "cfg", "extra_state", "optimizer_history"):
            if key == "cfg":
                old[key].pop("distributed_training"), new[key].pop("distributed_training")
            assert same(old[key], new[key]), (path, key)


def test_parts_to_one_and_back_end_bit_equal(tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=4, shards=2), tmp_path / "four", 4)
    one = reshard_mp(paths, f"{tmp_path}/one.pt", form=WHOLE)
    back = reshard_mp(one, f"{tmp_path}/back/x-model_part-{{i}}.pt", num_output_parts=4, form=WHOLE)
    for before, after in zip(paths, back, strict=True):
        assert same(load(before)["model"], load(after)["model"])
        assert same(load(before)["shard_metadata"], load(after)["shard_metadata"])
    weights = load(one[0])["model"]
    assert all(torch.equal(weights[name], t) for name, t in fused_weights(with_dtype("fp16")).items())


def test_raw_shards_become_other_parts_in_one_step(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", parts=2, shards=3)
    got = reshard_mp(paths, f"{tmp_path}/x-model_part-{{i}}.pt", num_output_parts=4, form=WHOLE)
    for part, path in enumerate(got):
        wanted = split_part(fused_weights(with_dtype("fp16")), part, 4)
        assert all(torch.equal(load(path)["model"][name], tensor) for name, tensor in wanted.items())


def test_runs_chain_through_true_metadata(tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=2, shards=3), tmp_path / "two", 2)
    one = reshard_mp(paths, f"{tmp_path}/x-model_part-0.pt", form=WHOLE)
    shards = reshard_fsdp(one, f"{tmp_path}/out/y-model_part-0-shard{{i}}.pt", num_output_shards=5, form=FLAT)
    for path, wanted in zip(shards, write_shards(tmp_path / "want", parts=1, shards=5), strict=True):
        assert same(load(path)["model"], load(wanted)["model"])
        assert same(load(path)["shard_metadata"], load(wanted)["shard_metadata"])
    assert open_checkpoint(tmp_path / "out").config == with_dtype("fp16")


def test_parts_without_metadata_are_cut_as_the_trainer_would(tmp_path: Path) -> None:
    weights = fused_weights(with_dtype("fp16"))
    cfg = {"model": Namespace(decoder_attention_heads=4)}
    torch.save({"model": {n: t.clone() for n, t in weights.items()}, "cfg": cfg}, tmp_path / "reshard.pt")
    shards = reshard_fsdp([tmp_path / "reshard.pt"], f"{tmp_path}/x-shard{{i}}.pt", num_output_shards=3, form=FLAT)
    want = write_shards(tmp_path / "want", parts=1, shards=3)
    for path, wanted in zip(shards, want, strict=True):
        new, old = load(path), load(wanted)
        del old["model"]["decoder.version"]
        assert same(new["model"], old["model"])
        assert same(new["shard_metadata"]["param_metadata"], old["shard_metadata"]["param_metadata"])


def test_a_tied_output_has_both_names_and_one_storage(tmp_path: Path) -> None:
    (path,) = join(write_shards(tmp_path, parts=1, shards=2), tmp_path / "out", 1)
    model = load(path)["model"]
    assert model[TIED].data_ptr() == model["decoder.embed_tokens.weight"].data_ptr()
    for output in reshard_mp([path], f"{tmp_path}/two/{{i}}-model_part-{{i}}.pt", num_output_parts=2, form=WHOLE):
        model = load(output)["model"]
        assert model[TIED].shape == (12, 16), "it is a vocabulary split, not a copy"
        assert model[TIED].data_ptr() == model["decoder.embed_tokens.weight"].data_ptr()


def test_an_untied_output_is_split_by_the_vocabulary(tmp_path: Path) -> None:
    config = with_dtype("fp16", tied_output=False)
    paths = join(write_shards(tmp_path / "in", config, parts=2, shards=3), tmp_path / "two", 2)
    (one,) = reshard_mp(paths, f"{tmp_path}/one.pt", form=WHOLE)
    assert torch.equal(load(one)["model"][TIED], fused_weights(config)[TIED])


def test_other_tensors_own_their_storage_alone(tmp_path: Path) -> None:
    (path,) = join(write_shards(tmp_path, parts=1, shards=2), tmp_path / "out", 1)
    model = load(path)["model"]
    assert len({t.untyped_storage().data_ptr() for t in model.values()}) == len(model) - 1
    assert all(
        t.untyped_storage().nbytes() == t.numel() * t.element_size()
        for t in torch.load(path, weights_only=False)["model"].values()
    )


def test_optimizer_state_is_left_out_on_request(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=2)
    (path,) = join(paths, tmp_path / "out", 1, Form(skip_optimizer_state=True))
    assert "last_optimizer_state" not in load(path)
    assert path.stat().st_size < sum(p.stat().st_size for p in paths) / 2


def test_joined_moments_hold_no_padding(tmp_path: Path) -> None:
    (path,) = join(write_shards(tmp_path, parts=1, shards=7), tmp_path / "out", 1)
    state = load(path)
    for entry, unit in zip(
        state["last_optimizer_state"]["state"].values(), state["shard_metadata"]["param_metadata"], strict=True
    ):
        info = unit["params"]["flat_param_0"]
        path_ = f"{unit['fsdp_path']}." if unit["fsdp_path"] else ""
        flat = torch.cat([state["model"][path_ + name].flatten() for name in info["names"]]).float()
        assert entry["step"] == 1000
        assert torch.equal(entry["exp_avg"], flat / 4)
        assert torch.equal(entry["exp_avg_sq"], flat.square())


def test_the_step_that_torchs_own_adam_keeps_in_a_tensor_is_kept(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=2)
    for path in paths:
        edit(path, lambda s: [e.update(step=torch.tensor(9.0)) for e in s["last_optimizer_state"]["state"].values()])
    (joined,) = join(paths, tmp_path / "out", 1)
    assert load(joined)["last_optimizer_state"]["state"][1]["step"] == torch.tensor(9.0)


def test_optimizer_state_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, parts=1, shards=1)
    edit(path, lambda s: s["last_optimizer_state"]["state"][1].update(exp_avg=torch.zeros(5)))
    with pytest.raises(CheckpointMismatch, match=r"exp_avg of decoder\.layers\.0.*--skip-optimizer-state True"):
        join([path], tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_output_dtype_changes_the_weights_and_not_the_moments(dtype: str, tmp_path: Path) -> None:
    target = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    paths = write_shards(tmp_path, parts=1, shards=3)
    (path,) = join(paths, tmp_path / "out", 1, Form(dtype=target))
    state = load(path)
    for name, tensor in fused_weights(with_dtype("fp16")).items():
        assert same(state["model"][name], tensor.to(target))
    assert state["last_optimizer_state"]["state"][0]["exp_avg"].dtype == torch.float32
    shard = reshard_fsdp(paths, f"{tmp_path}/x{{i}}.pt", num_output_shards=2, form=Form(unflatten=False, dtype=target))
    assert load(shard[1])["model"]["flat_param_0"].dtype == target


def test_what_the_file_says_of_itself_is_true_afterwards(tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=2, shards=2), tmp_path / "two", 2)
    (one,) = reshard_mp(paths, f"{tmp_path}/one.pt", form=WHOLE)
    cfg = load(one)["cfg"]
    assert isinstance(cfg["model"], Namespace)
    assert cfg["model"].model_parallel_size == cfg["common"]["model_parallel_size"] == 1
    assert cfg["distributed_training"]["use_sharded_state"] is False
    assert load(one)["task_state"] == {}
    assert load(one)["optimizer_history"][0]["num_updates"] == 1000
    names = load(one)["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]
    assert names["shapes"][0] == torch.Size([48, 16])
    assert load(paths[0])["cfg"]["common"]["model_parallel_size"] == 2


class LockingArray:
    """Stands for the class that metaseq leaves in its training data's state."""

    def __init__(self) -> None:
        self.data = [1, 2]


def _with_cache(state: dict[str, Any]) -> None:
    state["extra_state"]["train_iterator"]["tokenization_cache"] = LockingArray()
    state["extra_state"]["rng_tracker_states"] = {"cuda": torch.zeros(3, dtype=torch.uint8)}


def test_what_cannot_be_kept_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_shards(tmp_path, parts=1, shards=2)
    edit(paths[0], _with_cache)
    with caplog.at_level(logging.WARNING):
        (path,) = join(paths, tmp_path / "out", 1)
    (record,) = caplog.records
    assert "extra_state.train_iterator.tokenization_cache" in record.getMessage()
    assert "LockingArray" in record.getMessage()
    assert "extra_state.rng_tracker_states" in record.getMessage()
    extra = load(path)["extra_state"]
    assert extra["train_iterator"] | {"sequences_consumed": [8000]} == {
        "epoch": 1,
        "sequences_consumed": [8000],
        "n": 1000,
        "next_worker": 0,
        "tokenization_cache": None,
    }
    assert extra["metrics"]["train"][0][3]["val"] == 4.0


def test_metaseqs_requirement_is_dropped_on_request(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=2)
    edit(paths[0], _with_cache)
    (path,) = join(paths, tmp_path / "out", 1, Form(drop_metaseq_req=True))
    assert load(path)["extra_state"]["train_iterator"] is None


def test_copies_that_differ_between_parts_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = join(write_shards(tmp_path / "in", parts=2, shards=1), tmp_path / "two", 2)
    edit(paths[1], lambda s: s["model"]["decoder.layers.1.fc2.bias"].add_(0.5))
    with caplog.at_level(logging.WARNING):
        (one,) = reshard_mp(paths, f"{tmp_path}/one.pt", form=WHOLE)
    assert ["decoder.layers.1.fc2.bias" in r.getMessage() for r in caplog.records] == [True]
    assert torch.equal(
        load(one)["model"]["decoder.layers.1.fc2.bias"], fused_weights(with_dtype("fp16"))["decoder.layers.1.fc2.bias"]
    )


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("parts", [3, 8, 0])
def test_a_number_of_parts_that_does_not_divide_is_refused(parts: int, tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=2, shards=1), tmp_path / "two", 2)
    with pytest.raises((ParallelSizeError, SettingsError), match=f"--num-output-parts.* {parts}"):
        reshard_mp(paths, f"{tmp_path}/out/{{i}}.pt", num_output_parts=parts, form=WHOLE)
    assert not (tmp_path / "out").exists()


def test_two_parts_are_not_taken_for_two_shards(tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=2, shards=1), tmp_path / "two", 2)
    with pytest.raises(SettingsError, match="files of 2 parts"):
        reshard_fsdp(paths, f"{tmp_path}/x.pt", form=WHOLE)
    for index, path in enumerate(paths):
        path.rename(tmp_path / f"two/x-shard{index}.pt")
    with pytest.raises(CheckpointMismatch, match="these are parts"):
        reshard_fsdp(sorted((tmp_path / "two").iterdir()), f"{tmp_path}/x.pt", form=WHOLE)


def test_a_missing_shard_or_part_stops_everything(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=2, shards=3)
    with pytest.raises(CheckpointNotFound, match=r"part-1-shard1\.pt is missing"):
        reshard_fsdp([paths[3], paths[5]], f"{tmp_path}/out/x.pt", form=WHOLE)
    with pytest.raises(CheckpointNotFound, match=r"part-1-shard2\.pt is missing"):
        reshard_fsdp(paths[3:5], f"{tmp_path}/out/x.pt", form=WHOLE)
    whole = join(paths, tmp_path / "whole", 2)
    with pytest.raises(CheckpointNotFound, match=r"part-1\.pt is missing"):
        reshard_mp(whole[:1], f"{tmp_path}/out/x.pt", form=WHOLE)
    assert not (tmp_path / "out").exists()


def test_several_outputs_need_a_number_in_their_name(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, parts=1, shards=1)
    with pytest.raises(SettingsError, match=r"--num-output-shards 2 makes several; put \{i\} into it"):
        reshard_fsdp(paths, f"{tmp_path}/x.pt", num_output_shards=2, form=FLAT)
    with pytest.raises(SettingsError, match="cannot be unflattened"):
        reshard_fsdp(paths, f"{tmp_path}/x{{i}}.pt", num_output_shards=2, form=WHOLE)


def test_an_output_over_an_input_is_refused(tmp_path: Path) -> None:
    paths = join(write_shards(tmp_path / "in", parts=2, shards=1), tmp_path / "two", 2)
    with pytest.raises(SettingsError, match="is one of the inputs"):
        reshard_mp(paths, f"{tmp_path}/in/../two/reshard-model_part-{{i}}.pt", num_output_parts=4, form=WHOLE)
    with pytest.raises(SettingsError, match="is a folder; name a file in it"):
        reshard_mp(paths, f"{tmp_path}/two", form=WHOLE)


def test_one_flat_vector_of_two_dtypes_is_refused(tmp_path: Path) -> None:
    (path,) = join(write_shards(tmp_path, parts=1, shards=1), tmp_path / "out", 1)
    edit(path, lambda s: s["model"].update({"decoder.layer_norm.bias": torch.zeros(16)}))
    with pytest.raises(CheckpointMismatch, match=r"float16 and torch\.float32 in one unit.*--output-dtype"):
        reshard_fsdp([path], f"{tmp_path}/x.pt", form=FLAT)
