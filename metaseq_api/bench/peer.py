"""Hugging Face's OPT of any of our shapes, with our weights: the oracle of `gpu_check`, and the rival everywhere.

transformers is imported only when a model is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.errors import SettingsError
from metaseq_api.parallel.layers import Source, read_whole

Generated = list[list[int]]


class _Told:
    """A streamer, as `generate` knows them."""

    def __init__(self, told: Callable[[], object]) -> None:
        self._told = told

    def put(self, value: Tensor) -> None:
        self._told()

    def end(self) -> None:
        pass


class Weights(Protocol):
    """Any that our own model can be loaded from."""

    def tensor(self, name: str) -> Source: ...


def hugging_face(config: ModelConfig, weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """An OPTForCausalLM with these weights, ready to run.

    Raises: SettingsError where it is not installed, or has no such model.
    """
    try:
        from transformers import GenerationConfig, OPTConfig, OPTForCausalLM
    except ImportError:
        raise SettingsError("--against hf needs Hugging Face's library: pip install transformers") from None
    if not (config.tied_output and config.bias):
        raise SettingsError("--against hf measures models with biases and a tied output; leave it out for this one")

    shape = OPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_dim,
        word_embed_proj_dim=config.embed_dim,
        num_hidden_layers=config.num_layers,
        ffn_dim=config.ffn_dim,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        do_layer_norm_before=config.pre_norm,
        activation_function="gelu_new" if config.activation == "gelu" else "relu",
    )
    with torch.device("meta"):
        model = OPTForCausalLM(shape)
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, p in model.model.decoder.named_parameters():
            name = name.replace("project_in.", "project_in_dim.").replace("project_out.", "project_out_dim.")
            name = "layer_norm" + name[len("final_layer_norm") :] if name.startswith("final_layer_norm") else name
            p.copy_(read_whole(weights.tensor(f"decoder.{name}")))
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=1, bos_token_id=2, eos_token_id=None)
    return model


@torch.inference_mode()
def logits(model: Any, token_ids: list[int]) -> Tensor:
    """Of every position of one text. Shapes: -> [T, V] fp32."""
    out: Tensor = model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0].float()
    return out


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Generated,
    num: int,
    *,
    static: bool = False,
    how: dict[str, Any] | None = None,
    banned: list[int] | None = None,
    told: Callable[[], object] | None = None,
) -> Generated:
    """Continue prompts by `num` tokens, greedily unless `how` says otherwise, padded on the left; `static`: on a cache
    of fixed size, compiled.

    `told` hears of the prompts before they are computed, then of each token of all.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[1] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    more: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    more |= how or {}
    if banned is not None:
        more["suppress_tokens"] = banned
    if told is not None:
        more["streamer"] = _Told(told)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num, **more)
    assert out.shape[1] == ids.shape[1] + num, out.shape
    found: Generated = out[:, ids.shape[1] :].tolist()
    return found
