"""The arithmetic of flat parameters, against fairscale's and torch's own."""

import pytest
import torch
from support.checkpoints import TINY

from metaseq_api.checkpoint.flat import Unit, held, is_flat, read_units, slice_len, units_of, write_units
from metaseq_api.checkpoint.rules import clean, logical_names, split_dim
from metaseq_api.checkpoint.trainer import FlatOPT, fsdp_wrap
from metaseq_api.errors import CheckpointMismatch


@pytest.mark.parametrize("numel", [1, 2, 5, 97, 480])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 8, 124])
def test_slices_are_those_of_torch_chunk_with_empty_ones_added(numel: int, num_shards: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(numel).chunk(num_shards)]
    chunks += [[]] * (num_shards - len(chunks))
    length = slice_len(numel, num_shards)
    assert length == len(chunks[0])
    assert [list(held(numel, length, shard)) for shard in range(num_shards)] == chunks


@pytest.mark.parametrize("num_shards", [1, 3, 124])
def test_metadata_reads_and_writes_as_fairscale_makes_it(num_shards: int) -> None:
    for shard in (0, num_shards - 1):
        fsdp = fsdp_wrap(FlatOPT(TINY, 2), shard, num_shards)
        metadata = fsdp.local_metadata_dict()
        units, padding = read_units(metadata)
        assert write_units(units, shard, num_shards, ["decoder.version"]) == metadata
        assert [unit.path for unit in units] == ["", "decoder.layers.0", "decoder.layers.1"]
        for unit in units:
            length = slice_len(unit.numel, num_shards)
            assert padding[unit.key] == length - len(held(unit.numel, length, shard))


def test_metadata_entries_keep_the_order_that_readers_unpack_by_position() -> None:
    unit = Unit("decoder.layers.0", "flat_param_0", ("decoder.layers.0.fc1.bias",), ((3,),))
    entry = write_units([unit], 1, 2, [])["param_metadata"][0]
    assert list(entry["params"]["flat_param_0"]) == ["names", "shapes", "numels", "padding"]
    assert entry["params"]["flat_param_0"]["padding"] == 1
    assert entry["params"]["flat_param_0"]["names"] == ["fc1.bias"]


def test_wrapper_modules_are_taken_out_of_names() -> None:
    assert clean("decoder.layers.0._fsdp_wrapped_module._fpw_module.fc1.weight") == "decoder.layers.0.fc1.weight"
    assert clean("_fpw_module.decoder.version") == "decoder.version"
    assert is_flat("decoder.layers.3.flat_param_0")
    assert is_flat("flat_param")
    assert not is_flat("decoder.flat_param_0.weight")


def test_parameters_without_metadata_are_laid_out_as_the_trainer_does() -> None:
    model = FlatOPT(TINY)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    units, _ = read_units(fsdp_wrap(model, 0, 1).local_metadata_dict())
    assert units_of(shapes) == units


def test_a_fused_projection_is_keys_values_queries() -> None:
    assert logical_names("decoder.layers.1.self_attn.qkv_proj.bias") == (
        "decoder.layers.1.self_attn.k_proj.bias",
        "decoder.layers.1.self_attn.v_proj.bias",
        "decoder.layers.1.self_attn.q_proj.bias",
    )


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.fc1.gate.weight", "encoder.fc1.weight", "decoder.layers.x.fc1.bias"]
)
def test_a_name_of_another_architecture_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(CheckpointMismatch, match=name.replace(".", r"\.")):
        split_dim(name)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"param_metadata": [{}]}, {"param_metadata": [{"fsdp_path": "", "params": {"flat_param_0": {}}}]}, "x"],
)
def test_metadata_that_is_not_fairscales_is_refused(metadata: object) -> None:
    with pytest.raises(ValueError, match="not fairscale's"):
        read_units(metadata)
