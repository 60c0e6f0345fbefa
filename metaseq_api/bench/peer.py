"""Hugging Face's OPT of any of our shapes, with our weights: the oracle and the rival of `gpu_check`.

transformers is imported only when a model is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.model.weights import DeviceWeights

Generated = list[list[int]]


def hugging_face(config: ModelConfig, weights: DeviceWeights, device: torch.device, dtype: torch.dtype) -> Any:
    """An OPTForCausalLM with these weights, ready to run."""
    from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

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
            p.copy_(weights.tensor(f"decoder.{name}").value)
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
    model: Any, prompts: Generated, num: int, *, static: bool = False, banned: list[int] | None = None
) -> Generated:
    """Continue prompts of one length by `num` tokens, greedily; `static`: on a cache of fixed size, compiled."""
    ids = torch.tensor(prompts, device=model.device)
    more: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    if banned is not None:
        more["suppress_tokens"] = banned
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, **more)
    assert out.shape[1] == ids.shape[1] + num, out.shape
    found: Generated = out[:, ids.shape[1] :].tolist()
    return found
