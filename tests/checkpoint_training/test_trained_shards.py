"""Two real processes train under fairscale's FSDP; what their shards hold, and that it is read back bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.trainer import FlatOPT

TESTS = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("train_rank.py")
SIZE = 2
TIMEOUT_S = 120

_spec = importlib.util.spec_from_file_location("train_rank", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a training of a few steps left."""
    folder = tmp_path_factory.mktemp("training")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), str(SIZE)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * SIZE, "\n".join(outputs)
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> list[dict[str, Any]]:
    names = [f"checkpoint_last-model_part-0-shard{rank}.pt" for rank in range(SIZE)]
    assert sorted(p.name for p in folder.glob("checkpoint*")) == names
    return [torch.load(folder / name, weights_only=False) for name in names]


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """What FSDP itself said in rank 0."""
    loaded: dict[str, Any] = torch.load(folder / "told.pt", weights_only=False)
    return loaded


def unit_prefix(unit: dict[str, Any]) -> str:
    return unit["fsdp_path"] + "." if unit["fsdp_path"] else ""


def join(shards: list[dict[str, Any]], flat_name: str, values: list[Tensor]) -> dict[str, Tensor]:
    """One unit's tensors from its slices, each without its own padding: the rule of the format, spelled out."""
    pieces = []
    for shard, value in zip(shards, values, strict=True):
        (unit,) = [u for u in shard["shard_metadata"]["param_metadata"] if unit_prefix(u) + "flat_param_0" == flat_name]
        info = unit["params"]["flat_param_0"]
        pieces.append(value[: len(value) - info["padding"]])
    parts = torch.cat(pieces).split(info["numels"])
    return {
        unit_prefix(unit) + name: part.view(shape)
        for name, part, shape in zip(info["names"], parts, info["shapes"], strict=True)
    }


@pytest.fixture(scope="module")
def reference(told: dict[str, Any]) -> tuple[FlatOPT, torch.optim.Adam]:
    """The same training by one process that never heard of FSDP."""
    model = FlatOPT(worker.CONFIG)
    model.load_state_dict(told["initial"])
    optimizer = torch.optim.Adam(model.parameters(), **worker.ADAM)
    for _ in range(worker.STEPS):
        torch.autograd.backward(worker.loss_of(model, worker.batch()))
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_training_is_the_one_a_single_process_does(
    told: dict[str, Any], reference: tuple[FlatOPT, torch.optim.Adam]
) -> None:
    assert told["losses"][-1] < told["losses"][0]
    weights = reference[0].state_dict()
    assert sorted(weights) == sorted(told["final"])
    for name, tensor in weights.items():
        assert torch.equal(told["final"][name], told["initial"][name]) == (name == "decoder.version")
        # four steps of 1e-2 moved the weights by about 4e-2; the order of sums over two ranks may differ
        torch.testing.assert_close(told["final"][name], tensor, atol=2e-5, rtol=1e-5)


def test_a_shard_has_metaseqs_keys(shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        assert list(shard) == [
            "cfg",
            "model",
            "criterion",
            "optimizer_history",
            "task_state",
            "extra_state",
            "last_optimizer_state",
            "shard_metadata",
        ]
        assert isinstance(shard["cfg"]["model"], Namespace)
        assert shard["cfg"]["distributed_training"]["use_sharded_state"] is True
        assert shard["cfg"]["distributed_training"]["distributed_world_size"] == SIZE
        assert shard["optimizer_history"][-1]["num_updates"] == worker.STEPS
        assert "train_iterator" in shard["extra_state"]


def test_every_layer_is_a_unit_of_its_own(shards: list[dict[str, Any]]) -> None:
    flat = ["flat_param_0", "decoder.layers.0.flat_param_0", "decoder.layers.1.flat_param_0"]
    for shard in shards:
        assert sorted(shard["model"]) == sorted([*flat, "decoder.version"])
        assert all(shard["model"][name].dim() == 1 for name in flat)
        assert shard["model"]["decoder.version"].item() == 3.0
        assert shard["shard_metadata"]["buffer_names"] == ["decoder.version"]


def test_the_metadata_is_laid_out_for_readers_that_go_by_position(shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        units = shard["shard_metadata"]["param_metadata"]
        assert [u["fsdp_path"] for u in units] == ["", "decoder.layers.0", "decoder.layers.1"]
        for unit in units:
            assert list(unit) == ["fsdp_path", "params", "no_broadcast_optim_state", "shared_param_info"]
            assert list(unit["params"]) == ["flat_param_0"]
            assert list(unit["params"]["flat_param_0"]) == ["names", "shapes", "numels", "padding"]
        assert units[0]["shared_param_info"] == [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]


def test_slices_are_of_one_length_and_only_their_own_padding_is_zeros(shards: list[dict[str, Any]]) -> None:
    paddings = []
    for name in ("flat_param_0", "decoder.layers.0.flat_param_0", "decoder.layers.1.flat_param_0"):
        assert len({len(shard["model"][name]) for shard in shards}) == 1
    for shard in shards:
        for unit in shard["shard_metadata"]["param_metadata"]:
            padding = unit["params"]["flat_param_0"]["padding"]
            flat = shard["model"][unit_prefix(unit) + "flat_param_0"]
            assert not flat[len(flat) - padding :].any()
            paddings.append(padding)
    assert paddings == [0, 0, 0, 0, 1, 1]


def test_slices_joined_by_the_rule_are_fsdps_own_full_state(shards: list[dict[str, Any]], told: dict[str, Any]) -> None:
    joined: dict[str, Tensor] = {"decoder.version": shards[0]["model"]["decoder.version"]}
    for name in shards[0]["model"]:
        if name.endswith("flat_param_0"):
            joined |= join(shards, name, [shard["model"][name] for shard in shards])
    joined["decoder.output_projection.weight"] = joined["decoder.embed_tokens.weight"]
    assert sorted(joined) == sorted(told["final"])
    for name, tensor in told["final"].items():
        assert torch.equal(joined[name], tensor), name


def test_our_reader_gives_what_fsdp_itself_says_the_model_is(folder: Path, told: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.num_parts, checkpoint.num_shards) == (1, SIZE)
    assert checkpoint.config == worker.CONFIG
    wanted: dict[str, Tensor] = {}
    for name, tensor in told["final"].items():
        if "qkv_proj" in name:
            thirds = zip(("k_proj", "v_proj", "q_proj"), tensor.chunk(3), strict=True)
            wanted |= {name.replace("qkv_proj", third): rows for third, rows in thirds}
        elif name not in ("decoder.version", "decoder.output_projection.weight"):
            wanted[name] = tensor
    assert sorted(checkpoint.names()) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(checkpoint.tensor(name).read_all(), tensor), name


def test_moments_follow_the_units_and_join_to_those_of_a_single_process(
    shards: list[dict[str, Any]], reference: tuple[FlatOPT, torch.optim.Adam]
) -> None:
    # fairscale's own gather_full_optim_state_dict is no oracle: on a CPU it returns one buffer under every name
    model, optimizer = reference
    wanted = {name: optimizer.state[param] for name, param in model.named_parameters()}
    seen = set()
    for index, unit in enumerate(shards[0]["shard_metadata"]["param_metadata"]):
        flat_name = unit_prefix(unit) + "flat_param_0"
        states = [shard["last_optimizer_state"]["state"][index] for shard in shards]
        assert [state["step"] for state in states] == [worker.STEPS] * SIZE
        for moment, atol in (("exp_avg", 1e-6), ("exp_avg_sq", 1e-8)):
            values = [state[moment] for state in states]
            assert [v.shape for v in values] == [shard["model"][flat_name].shape for shard in shards]
            for name, tensor in join(shards, flat_name, values).items():
                torch.testing.assert_close(tensor, wanted[name][moment], atol=atol, rtol=1e-3)
                assert tensor.any()
                seen.add(name)
    assert seen == set(wanted)
    assert all("loss_scale" in shard["last_optimizer_state"] for shard in shards)
