"""Tiny Hugging Face OPTs with random weights, one for every quirk of the published sizes, and their weights by
metaseq's names. Hugging Face is the oracle; nothing here knows our model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from metaseq_api.core import ModelConfig

VARIANTS: dict[str, dict[str, object]] = {
    "pre-norm": {},
    "odd heads": {"num_attention_heads": 12, "hidden_size": 96, "word_embed_proj_dim": 96},
    "head width 80": {"hidden_size": 320, "word_embed_proj_dim": 320},
    "350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gelu": {"activation_function": "gelu_new"},
}


def tiny_opt(variant: str, *, seed: int = 0, window: int = 64, vocab_size: int = 160) -> OPTForCausalLM:
    """A model of two layers whose every tensor matters: biases and norms are random too."""
    sizes: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "ffn_dim": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": window,
        "dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**(sizes | VARIANTS[variant]))).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm.weight" in name else 0.0, 0.1 if "norm" in name else 0.08)
    return model


def config_of(model: OPTForCausalLM) -> ModelConfig:
    c = model.config
    return ModelConfig(
        num_layers=c.num_hidden_layers,
        hidden_dim=c.hidden_size,
        num_heads=c.num_attention_heads,
        ffn_dim=c.ffn_dim,
        vocab_size=c.vocab_size,
        max_positions=c.max_position_embeddings,
        embed_dim=c.word_embed_proj_dim,
        pre_norm=c.do_layer_norm_before,
        final_norm=c.do_layer_norm_before,
        activation="relu" if c.activation_function == "relu" else "gelu",
        dtype="fp32",
    )


def metaseq_weights(model: OPTForCausalLM) -> dict[str, Tensor]:
    """The weights under metaseq's names, q, k and v apart."""
    renamed = {}
    for name, value in model.model.decoder.state_dict().items():
        name = name.replace("project_in.", "project_in_dim.").replace("project_out.", "project_out_dim.")
        if name.startswith("final_layer_norm"):
            name = name.replace("final_layer_norm", "layer_norm")
        renamed[f"decoder.{name}"] = value.detach().clone()
    return renamed


def logits(model: OPTForCausalLM, token_ids: list[int]) -> Tensor:
    """Shapes: -> [T, V], fp32."""
    with torch.inference_mode():
        out: Tensor = model(torch.tensor([token_ids])).logits[0].float()
        return out
