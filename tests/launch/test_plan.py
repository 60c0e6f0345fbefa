"""Whether a model fits where it is to go, said before anything is submitted."""

from __future__ import annotations

import pytest
import torch

from metaseq_api.core.config import OPT_SHAPES, ModelConfig
from metaseq_api.errors import MemoryTooSmall, ParallelSizeError, SettingsError
from metaseq_api.launch import plan
from metaseq_api.launch.cluster import Node
from metaseq_api.launch.plan import GIB, allowed_sizes, gpu_memory, lay_out
from metaseq_api.model import memory
from metaseq_api.settings import Settings

OPT_175B = OPT_SHAPES["opt-175b"]


@pytest.mark.parametrize("name", OPT_SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_it_counts_as_a_rank_counts_when_it_runs(
    name: str, dtype: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OPT_SHAPES[name]
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**15)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**15, 10**15))
    ours = lay_out(config, nodes=1, gpus=gpus, model_parallel=2, dtype=dtype)
    kept = getattr(torch, {"fp32": "float32", "fp16": "float16"}[dtype])
    theirs = memory.plan(
        config,
        Settings(),
        dtype=kept,
        kept=kept,  # a rank whose CPU keeps halves takes less; where jobs are submitted that is not known
        device=torch.device("cuda:0" if gpus else "cpu"),
        tensor_size=2,
        ranks_here=2,
        max_seq_len=config.max_positions,
    )
    assert ours.weight_bytes == theirs.weight_bytes
    assert ours.token_bytes * Settings().block_size == theirs.block_bytes
    assert plan.GPU_SHARE == memory.GPU_SHARE


@pytest.mark.parametrize("name", OPT_SHAPES)
def test_the_sizes_are_those_that_the_model_allows(name: str) -> None:
    config = OPT_SHAPES[name]
    for size in range(1, config.num_heads + 1):
        if size in allowed_sizes(config):
            config.check_parallel(size)
        else:
            with pytest.raises(ParallelSizeError):
                config.check_parallel(size)


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "size"),
    [("opt-175b", 1, 8, 8), ("opt-175b", 2, 8, 16), ("opt-125m", 1, 8, 4), ("opt-66b", 1, 6, 4), ("opt-13b", 2, 0, 2)],
)
def test_it_takes_the_widest_size_that_divides_the_model(name: str, nodes: int, gpus: int, size: int) -> None:
    assert lay_out(OPT_SHAPES[name], nodes=nodes, gpus=gpus).model_parallel == size


def test_what_is_left_out_and_what_fits_is_told() -> None:
    lines = lay_out(OPT_SHAPES["opt-125m"], nodes=1, gpus=8, gpu_bytes=16 * GIB).lines()
    assert lines[0] == "tensor parallel over 4 rank(s): 1 node(s) x 4 GPU(s), fp16"
    assert "of 16 GiB a GPU: room for" in lines[2]
    assert lines[3] == "4 of 8 GPUs of each node are left out: not asked for"
    assert "give --gpu-memory GB" in lay_out(OPT_175B, nodes=1, gpus=8).lines()[2]


@pytest.mark.parametrize(
    ("nodes", "gpus", "gb", "advice"),
    [
        (1, 8, 40, "16 ranks would fit: --nodes 2 --model-parallel 16"),
        (2, 8, 24, "32 ranks would fit: --nodes 4 --model-parallel 32"),
        (1, 8, 4, "no tensor-parallel size that this model allows would fit: take larger GPUs or a smaller --dtype"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_size_that_would(
    nodes: int, gpus: int, gb: int, advice: str
) -> None:
    with pytest.raises(MemoryTooSmall, match=advice):
        lay_out(OPT_175B, nodes=nodes, gpus=gpus, gpu_bytes=gb * GIB)


def test_a_size_that_was_chosen_too_small_is_told_the_one_of_the_same_node() -> None:
    with pytest.raises(MemoryTooSmall, match="--model-parallel 8 would fit on one node"):
        lay_out(OPT_175B, nodes=1, gpus=8, model_parallel=4, gpu_bytes=80 * GIB)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (
            {"nodes": 1, "gpus": 8, "model_parallel": 5},
            ParallelSizeError,
            "5 does not divide this model's 96 attention heads",
        ),
        ({"nodes": 2, "gpus": 8, "model_parallel": 1}, SettingsError, "give a multiple of 2 up to 16"),
        (
            {"nodes": 1, "gpus": 4, "model_parallel": 8},
            SettingsError,
            "1 nodes of 4 GPUs; give a multiple of 1 up to 4",
        ),
        ({"nodes": 3, "gpus": 8}, ParallelSizeError, "cannot be split evenly over 3 nodes"),
        ({"nodes": 1, "gpus": 8, "max_seq_len": 4096}, SettingsError, "--max-seq-len is 4096, but this model has 2048"),
    ],
)
def test_what_cannot_be_is_refused_by_name(asked: dict[str, int], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        lay_out(OPT_175B, **asked)  # type: ignore[arg-type]


def node(kind: str, *features: str, gpus: int = 8) -> Node:
    return Node(
        name="n", state="IDLE", cpus=1, memory=1, gpus=gpus, gpu_type=kind, features=features, partitions=("p",)
    )


@pytest.mark.parametrize(
    ("kind", "features", "gb"),
    [
        ("h100", (), 80),
        ("nvidia_h100_80gb_hbm3", (), 80),
        ("a100", (), None),
        ("a100", ("a100_80gb",), 80),
        ("a100", ("80gb", "ib"), 80),
        ("nvidia_a100_1g.10gb", (), 10),
        ("v100", ("v100-32g",), 32),
        ("tesla_t4", (), 16),
        ("", ("gpu_mem:40g",), 40),
        ("", ("rack12g",), None),
        ("", (), None),
    ],
)
def test_a_gpus_memory_is_read_from_its_type_or_the_nodes_features(
    kind: str, features: tuple[str, ...], gb: int | None
) -> None:
    assert gpu_memory([node(kind, *features)]) == (None if gb is None else gb * GIB)


def test_the_smallest_gpu_of_the_nodes_counts_and_one_unknown_makes_all_unknown() -> None:
    assert gpu_memory([node("h100"), node("l4"), node("", gpus=0)]) == 24 * GIB
    assert gpu_memory([node("h100"), node("a100")]) is None
    assert gpu_memory([]) is None


def test_a_model_of_any_shape_is_laid_out() -> None:
    config = ModelConfig(num_layers=2, hidden_dim=64, num_heads=6, ffn_dim=96, vocab_size=48)
    assert allowed_sizes(config) == [1, 2, 3, 6]
    assert lay_out(config, nodes=3, gpus=1).model_parallel == 3
