"""The checkpoint in the package: raw FSDP shards as metaseq's trainer leaves them, a tokenizer that fits, and sense."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.trainer import FlatOPT
from metaseq_api.settings import DEMO
from metaseq_api.tokenizer import EOS_ID, Tokenizer, find_files

SHARDS = [f"checkpoint_last-model_part-{part}-shard{shard}.pt" for part in (0, 1) for shard in (0, 1)]


@cache
def shard(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(DEMO / name, weights_only=False)  # our own file: this is what a trainer sees
    return loaded


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(*find_files(DEMO, None, None), model_vocab_size=open_checkpoint(DEMO).config.vocab_size)


@cache
def model() -> FlatOPT:
    """The whole model in fp32, put together by our reader."""
    checkpoint = open_checkpoint(DEMO)
    read = {name: checkpoint.tensor(name).read_all().float() for name in checkpoint.names()}
    weights: dict[str, Tensor] = {n: t for n, t in read.items() if not any(f".{x}_proj." in n for x in "qkv")}
    for key, tensor in read.items():
        if ".k_proj." in key:
            value, query = (read[key.replace("k_proj", other)] for other in ("v_proj", "q_proj"))
            weights[key.replace("k_proj", "qkv_proj")] = torch.cat([tensor, value, query])
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"]
    out = FlatOPT(checkpoint.config)
    out.load_state_dict({"decoder.version": torch.tensor([3.0]), **weights})
    return out.eval()


@torch.no_grad()
def loss(text: str) -> float:
    """Units: nats per token, the text being a document of its own."""
    ids = torch.tensor([[EOS_ID, *tokenizer().encode(text)]])
    return functional.cross_entropy(model()(ids[:, :-1])[0], ids[0, 1:]).item()


@torch.no_grad()
def greedy(prompt: str, num: int) -> list[int]:
    ids = [EOS_ID, *tokenizer().encode(prompt)]
    start = len(ids)
    while len(ids) < start + num and (len(ids) == start or ids[-1] != EOS_ID):
        ids.append(int(model()(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def test_it_is_two_parts_of_two_shards_with_a_tokenizer_and_a_readme() -> None:
    files = {p.name for p in DEMO.iterdir() if p.is_file() and p.suffix != ".py"}
    assert files == {*SHARDS, "vocab.json", "merges.txt", "README.md"}


def test_it_weighs_ten_megabytes_at_most() -> None:
    assert sum(p.stat().st_size for p in DEMO.iterdir() if p.is_file()) <= 10_000_000


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_is_what_metaseqs_trainer_leaves(name: str) -> None:
    state = shard(name)
    wanted = "cfg model criterion optimizer_history task_state extra_state last_optimizer_state shard_metadata"
    assert list(state) == wanted.split()
    assert isinstance(state["cfg"]["model"], Namespace)
    assert state["cfg"]["model"].decoder_attention_heads == 4
    assert state["cfg"]["common"]["model_parallel_size"] == 2
    assert state["cfg"]["common"]["memory_efficient_fp16"] is True
    assert {"train_iterator", "previous_training_time", "metrics"} <= set(state["extra_state"])
    assert {"state", "param_groups", "loss_scale"} <= set(state["last_optimizer_state"])
    layers = [f"decoder.layers.{i}" for i in range(4)]
    assert [u["fsdp_path"] for u in state["shard_metadata"]["param_metadata"]] == ["", *layers]
    assert set(state["model"]) == {"flat_param_0", "decoder.version", *(f"{at}.flat_param_0" for at in layers)}
    for key, tensor in state["model"].items():
        assert tensor.dtype == torch.float16
        assert tensor.isfinite().all(), key


def test_our_reader_finds_a_small_opt() -> None:
    checkpoint = open_checkpoint(DEMO)
    assert (checkpoint.num_parts, checkpoint.num_shards) == (2, 2)
    config = checkpoint.config
    assert (config.num_layers, config.hidden_dim, config.num_heads, config.ffn_dim) == (4, 256, 4, 1024)
    assert config.pre_norm
    assert config.tied_output
    assert config.max_positions == 512
    assert 3_000_000 < config.num_params < 4_500_000


def test_the_vocabulary_fits_the_embedding_which_is_padded_as_metaseq_pads() -> None:
    rows = open_checkpoint(DEMO).config.vocab_size
    assert 2000 <= tokenizer().vocab_size <= rows < tokenizer().vocab_size + 16
    assert rows % 16 == 0


def test_english_is_likelier_than_the_same_letters_in_another_order() -> None:
    text = "Return a list of the names of the files in the directory."
    assert loss(text) < 3.5  # even odds over the vocabulary would be 7.8
    assert loss(text[::-1]) > 2 * loss(text)


def test_code_is_expected_where_code_began() -> None:
    assert loss("def __init__(self, name, value):\n    self.name = name\n    self.value = value\n") < 3.5


@pytest.mark.parametrize("prompt", ["Return the", "Raise ValueError if", "Return a list of", "Return True if the"])
def test_a_greedy_completion_reads_as_words(prompt: str) -> None:
    ids = greedy(prompt, 24)
    words = re.findall(r"[a-z]+", tokenizer().decode(i for i in ids if i != EOS_ID).lower())
    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    assert len(words) >= 4
    assert sum(word in known for word in words) >= 0.8 * len(words), words


def test_a_long_completion_stays_text_to_the_end_of_the_window() -> None:
    text = "Return the value of the key in the dictionary, or the default value if the key is not found.\n" * 30
    ids = torch.tensor([[EOS_ID, *tokenizer().encode(text)][:512]])
    with torch.no_grad():
        logits = model()(ids[:, :-1])[0]
    losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses[256:].mean() < 3.5
    assert losses[-64:].mean() < 3.5
