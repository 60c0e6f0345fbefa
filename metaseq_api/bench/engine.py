"""How fast the engine is, beside Hugging Face's `generate` on the same weights in the same run.

Three figures, never mixed: decode (one stream after its first token), prefill (one long prompt to its first token), and
throughput (many requests of unlike lengths at once, prompts included in the time but not in the count). Random weights
of any published shape, no file needed. Rounds are interleaved, so that both sides meet the same machine. Does not
print; transformers is imported only to be measured.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from metaseq_api.core import ModelConfig, Request, SamplingParams
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.worker import Worker
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT
from metaseq_api.model.weights import RandomWeights
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler
from metaseq_api.settings import Settings
from metaseq_api.tokenizer import Tokenizer, find_files

Generate = Callable[[list[list[int]], int], object]
"""Continue every prompt by exactly so many tokens, greedily, and wait."""
Figures = dict[str, dict[str, list[float]]]
"""Tokens a second by figure and side, a number for each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of each side. Units: tokens, requests."""

    rounds: int = 3
    prompt_len: int = 128
    new_tokens: int = 128
    prefill_len: int = 1024
    requests: int = 32


def sides(config: ModelConfig, dtype: torch.dtype, device: torch.device, against: str) -> dict[str, Generate]:
    """Ours, and who it is measured against. Raises: MetaseqApiError."""
    # all in this thread: a second one that computes would slow both (see Engine)
    out: dict[str, Generate] = {"ours": _ours(make_engine(config, dtype, device))}
    if against == "hf":
        out["hf"] = _hugging_face(config, dtype, device)
    return out


def make_engine(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Engine:
    """An engine on random weights, with room for the whole workload."""
    context, settings = ParallelContext(device=device), Settings()
    model = OPT(config, context, dtype)
    model.load(RandomWeights(config))
    num_blocks = 64 * config.max_positions // 4 // settings.block_size
    cache = KVCache(config, context, dtype, num_blocks=num_blocks, block_size=settings.block_size)
    pool = BlockPool(num_blocks, settings.block_size)
    tokenizer = Tokenizer.load(*find_files(settings.checkpoint, None, None), model_vocab_size=config.vocab_size)
    return Engine(
        worker=Worker(model, cache),
        channel=Channel(context),
        scheduler=Scheduler(pool, max_batch_tokens=settings.max_batch_tokens, max_batch_size=settings.max_batch_size),
        tokenizer=tokenizer,
        limits=Limits(max_seq_len=config.max_positions),
        model_name="bench",
    )


def measure(sides: dict[str, Generate], args: Load, say: Callable[[str], object]) -> Figures:
    """Tokens a second of each figure and side, one number a round. Sides take turns within a round."""
    figures: Figures = {f: {s: [] for s in sides} for f in ("decode", "prefill", "throughput")}
    for generate in sides.values():
        generate([_prompt(args.prompt_len, "warm")], 8)
        generate([_prompt(args.prefill_len, "warm")], 1)
        generate(_mixed(args.requests, "warm"), 4)
    for turn in range(args.rounds):
        for side, generate in sides.items():
            first = statistics.median(_time(generate, [_prompt(args.prompt_len, f"a{turn}{i}")], 1) for i in range(3))
            whole = _time(generate, [_prompt(args.prompt_len, f"b{turn}")], args.new_tokens)
            figures["decode"][side].append((args.new_tokens - 1) / (whole - first))
        for side, generate in sides.items():
            spent = statistics.median(_time(generate, [_prompt(args.prefill_len, f"c{turn}{i}")], 1) for i in range(3))
            figures["prefill"][side].append(args.prefill_len / spent)
        for side, generate in sides.items():
            spent = _time(generate, _mixed(args.requests, str(turn)), args.new_tokens)
            figures["throughput"][side].append(args.requests * args.new_tokens / spent)
        say(f"round {turn + 1} of {args.rounds} done")
    return figures


def _ours(engine: Engine) -> Generate:
    def generate(prompts: list[list[int]], num: int) -> object:
        params = SamplingParams(max_tokens=num, temperature=0, ignore_eos=True)
        tickets = [engine.submit(Request(request_id="bench", prompts=(tuple(p),), params=params)) for p in prompts]
        while not all(t.ended for t in tickets):
            engine.turn()
        return [t.result() for t in tickets]

    return generate


def _hugging_face(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Generate:
    """Hugging Face's OPT on the same weights; `generate` with a static, left-padded batch."""
    from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

    hf_config = OPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_dim,
        word_embed_proj_dim=config.embed_dim,
        num_hidden_layers=config.num_layers,
        ffn_dim=config.ffn_dim,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        do_layer_norm_before=config.pre_norm,
    )
    with torch.device("meta"):
        model = OPTForCausalLM(hf_config)
    model = model.to(dtype).to_empty(device=device).eval()
    weights = RandomWeights(config)
    with torch.no_grad():
        for name, p in model.model.decoder.named_parameters():
            name = name.replace("project_in.", "project_in_dim.").replace("project_out.", "project_out_dim.")
            name = "layer_norm" + name[len("final_layer_norm") :] if name.startswith("final_layer_norm") else name
            p.copy_(weights.tensor(f"decoder.{name}").value)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=1, bos_token_id=2, eos_token_id=None)

    def generate(prompts: list[list[int]], num: int) -> object:
        longest = max(map(len, prompts))
        ids = torch.tensor([[1] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        with torch.inference_mode():
            out: Any = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num)
        assert out.shape[1] == longest + num, out.shape
        return out.tolist()

    return generate


def _prompt(length: int, seed: str) -> list[int]:
    """</s> and random ids of the vocabulary's ordinary tokens."""
    r = random.Random(f"{length}-{seed}")
    return [2, *(r.randrange(4, 2000) for _ in range(length - 1))]


def _mixed(num: int, seed: str) -> list[list[int]]:
    """Prompts of 64 to 256 tokens; the lengths are the same in every round, the ids are not."""
    lengths = random.Random(1234)
    return [_prompt(lengths.randint(64, 256), f"{seed}-{i}") for i in range(num)]


def _time(generate: Generate, prompts: list[list[int]], num: int) -> float:
    began = time.perf_counter()
    generate(prompts, num)
    return time.perf_counter() - began


def table(figures: Figures) -> list[str]:
    """Medians in tokens a second, with the range, and the ratio of ours to the other."""
    lines = []
    for figure, sides in figures.items():
        cells = [f"{s} {statistics.median(v):8.1f} ({min(v):.1f}-{max(v):.1f})" for s, v in sides.items()]
        middle = [statistics.median(v) for v in sides.values()]
        ratio = f"  ratio {middle[0] / middle[1]:.2f}" if len(middle) > 1 else ""
        lines.append(f"  {figure:<11} tok/s  {'   '.join(cells)}{ratio}")
    return lines
