"""Our OPT gives Hugging Face's logits, for every variant, however the work is cut into steps."""

from __future__ import annotations

import pytest
import torch
from support.hf_opt import VARIANTS, config_of, logits, metaseq_weights, tiny_opt
from support.steps import Driver
from transformers import OPTForCausalLM

from metaseq_api.core import ModelConfig
from metaseq_api.core.config import OPT_SHAPES, tensor_shapes
from metaseq_api.errors import ParallelSizeError
from metaseq_api.model.weights import RandomWeights, TensorWeights


def tokens(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(4, 160, (n - 1,), generator=generator).tolist()]


def driver(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Driver, OPTForCausalLM]:
    hf = tiny_opt(variant)
    return Driver(config_of(hf), TensorWeights(metaseq_weights(hf)), dtype=dtype), hf


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_prompt_gives_hugging_faces_logits(variant: str) -> None:
    ours, hf = driver(variant)
    prompt = tokens(50)
    (got,) = ours.step((prompt, 0, [9, 3, 4, 20, 1, 0, 7]))
    torch.testing.assert_close(got, logits(hf, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_single_tokens_give_the_same_logits(variant: str) -> None:
    ours, hf = driver(variant)
    prompt, blocks = tokens(41), [5, 2, 30, 8, 11, 12]
    got = []
    for upto in (7, 8, 9, 10, 25, 40, 41):
        cached = sum(len(g) for g in got)
        got += ours.step((prompt[:upto], cached, blocks))
    torch.testing.assert_close(torch.cat(got), logits(hf, prompt), atol=1e-4, rtol=0)


def test_sequences_of_a_mixed_batch_do_not_touch_each_other() -> None:
    ours, hf = driver("pre-norm")
    a, b, c = tokens(30, 1), tokens(17, 2), tokens(9, 3)
    blocks = {"a": [0, 1, 2, 3], "b": [31, 4, 30], "c": [17, 5]}
    ours.step((a[:29], 0, blocks["a"]))
    ours.step((b[:16], 0, blocks["b"]))
    got = ours.step((a, 29, blocks["a"]), (c, 0, blocks["c"]), (b, 16, blocks["b"]))
    for found, sequence in zip(got, (a, c, b), strict=True):
        torch.testing.assert_close(found, logits(hf, sequence)[-len(found) :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("blocks", [([0, 1], [2, 3]), ([0, 1], [31, 30]), ([6, 1], [6, 2])])
def test_decoding_reads_blocks_in_place_scattered_or_shared(blocks: tuple[list[int], list[int]]) -> None:
    ours, hf = driver("pre-norm")
    head = tokens(8, 4)
    a, b = [*head, 20, 21, 22], [*head, 33, 34]
    for sequence, where in ((a, blocks[0]), (b, blocks[1])):
        ours.step((sequence[:-1], 0, where))
    got = ours.step((a, len(a) - 1, blocks[0]), (b, len(b) - 1, blocks[1]))
    for found, sequence in zip(got, (a, b), strict=True):
        torch.testing.assert_close(found, logits(hf, sequence)[-1:], atol=1e-4, rtol=0)


def test_decoding_reads_shared_heads_and_several_ranges_of_the_pool() -> None:
    hf = tiny_opt("pre-norm")
    ours = Driver(config_of(hf), TensorWeights(metaseq_weights(hf)), num_blocks=80)
    long, short = tokens(16, 5), tokens(8, 6)
    tables = [[40, 2, 70 + i] for i in range(5)] + [[10, 20 + i] for i in range(3)] + [[0, 79]]
    sequences = [[*long, 20 + i, 30, 31] for i in range(5)] + [[*short, 50 + i, 9] for i in range(3)] + [tokens(11, 7)]
    for sequence, blocks in zip(sequences, tables, strict=True):
        ours.step((sequence[:-1], 0, blocks))
    batch = [(sequence, len(sequence) - 1, blocks) for sequence, blocks in zip(sequences, tables, strict=True)]
    for found, sequence in zip(ours.step(*batch), sequences, strict=True):
        torch.testing.assert_close(found, logits(hf, sequence)[-1:], atol=1e-4, rtol=0)


def test_a_block_left_full_of_nan_does_not_reach_its_next_owner() -> None:
    ours, hf = driver("pre-norm")
    for pool in (*ours.cache.keys, *ours.cache.values):
        pool.fill_(torch.nan)
    prompt = tokens(12)
    got = ours.step((prompt[:10], 0, [3, 4])) + ours.step((prompt[:11], 10, [3, 4])) + ours.step((prompt, 11, [3, 4]))
    torch.testing.assert_close(torch.cat(got), logits(hf, prompt), atol=1e-4, rtol=0)


# The tolerance is Hugging Face's own error in the same dtype, against its fp32 logits: rounding to 8 or 11 bits between
# the same operations costs either of us about as much (measured: 0.7 to 1.2 times; 2026-11-20).
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_errs_no_more_than_hugging_face_does(variant: str, dtype: torch.dtype) -> None:
    ours, hf = driver(variant, dtype)
    prompt = tokens(40)
    want = logits(hf, prompt)
    theirs = logits(hf.to(dtype), prompt)
    got = ours.step((prompt[:39], 0, [0, 1, 2, 3, 4])) + ours.step((prompt, 39, [0, 1, 2, 3, 4]))
    assert (torch.cat(got) - want).abs().max() < 1.5 * (theirs - want).abs().max()


@pytest.mark.parametrize("name", OPT_SHAPES)
def test_a_published_shape_counts_its_parameters(name: str) -> None:
    published = {
        "opt-125m": 125_239_296,
        "opt-350m": 331_196_416,
        "opt-1.3b": 1_315_758_080,
        "opt-2.7b": 2_651_596_800,
        "opt-6.7b": 6_658_473_984,
        "opt-13b": 12_853_473_280,
        "opt-30b": 29_974_540_288,
        "opt-66b": 65_719_701_504,
        "opt-175b": 174_604_468_224,
    }
    config = OPT_SHAPES[name]
    elements = sum(torch.Size(s).numel() for s in tensor_shapes(config).values())
    assert config.num_params == elements == published[name]


def test_a_parallel_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(ParallelSizeError, match=r"--model-parallel 5 .* it can be 1, 2, 4"):
        OPT_SHAPES["opt-125m"].check_parallel(5)


def test_random_weights_are_the_same_for_every_reader() -> None:
    config = ModelConfig(num_layers=1, hidden_dim=8, num_heads=2, ffn_dim=16, vocab_size=16)
    a, b = RandomWeights(config, seed=3), RandomWeights(config, seed=3)
    for name in a.names():
        whole = a.tensor(name).read(0, 0, a.tensor(name).shape[0])
        torch.testing.assert_close(b.tensor(name).read(0, 1, 2), whole[1:2], atol=0, rtol=0)
