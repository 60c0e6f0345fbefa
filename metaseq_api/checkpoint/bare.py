"""Flat parameters without metadata, as metaseq's scripts of 2022 left them: what lies where in them.

The order is that of registration, less what units of their own hold: with one unit for all, the decoder's layer norm
comes after the layers; with a unit for each layer, it follows the positions in the root. The sizes are those that cfg
states, or the published ones; the number of parts, and a vocabulary that is not OPT's, follow from the lengths. The
vocabulary is in no cfg. Attention is taken to be fused, as in every model trained in parts: apart, it has one length
with it. Knows integers and names only.

Source: metaseq's transformer_decoder.py (registration); its reshard_mp.py of May 2022 drops the metadata.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metaseq_api.checkpoint.flat import Unit
from metaseq_api.checkpoint.rules import EMBED, OUTPUT, POSITIONS
from metaseq_api.core.config import OPT_SHAPES, POSITION_OFFSET, ModelConfig, heads_from_shape

VOCAB_SIZE = 50272
"""That of every published OPT: 50265 entries, filled up."""
MAX_PARTS = 64
MAX_PADDING = 1024
"""No more zeros than this end a unit: there is less than one for each rank of the run that cut it."""

_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.flat_param(?:_0)?")
_Shapes = dict[str, tuple[int, ...]]


def bare_units(lengths: Mapping[str, int], num_shards: int, cfg: Mapping[str, Any]) -> tuple[Unit, ...] | None:
    """Find the units that `num_shards` slices of these lengths hold; None where no model has such lengths.

    lengths: of one slice, by the flat parameter's key.
    """
    root, *layers = sorted(lengths, key=_layer_number)
    if [_layer_number(key) for key in layers] != list(range(len(layers))) or not root.startswith("flat_param"):
        return None
    totals = {key: lengths[key] * num_shards for key in (root, *layers)}
    for config, num_parts, slack in _candidates(totals, num_shards, cfg):
        if len(layers) not in (0, config.num_layers):
            continue
        units = _laid_out(config, num_parts, root, layers)
        if all(0 <= totals[u.key] - u.numel < slack for u in units):
            return units
    return None


def _layer_number(key: str) -> int:
    found = _LAYER_KEY.fullmatch(key)
    return -1 if found is None else int(found[1])


def _candidates(
    totals: Mapping[str, int], num_shards: int, cfg: Mapping[str, Any]
) -> Iterator[tuple[ModelConfig, int, int]]:
    """Models to try, over how many parts, and how many zeros less one may follow: fewer parts, larger ones, first."""
    said = _said(cfg)
    published = [config for config in OPT_SHAPES.values() if not config.has_projection]
    for config in ([said] if said else []) + published:
        for num_parts in _sizes(config):
            if config.vocab_size % num_parts == 0:
                yield config, num_parts, MAX_PADDING
    if said is None:
        return
    for num_parts in _sizes(said) if len(totals) > 1 else [n for n in _sizes(said) if n == _num_parts(cfg)]:
        rows = _vocab_rows(said, num_parts, totals, num_shards)
        if rows:
            yield dataclasses.replace(said, vocab_size=rows * num_parts), num_parts, num_shards


def _sizes(config: ModelConfig) -> list[int]:
    wanted = (config.num_heads, config.hidden_dim, config.ffn_dim)
    return [n for n in range(1, MAX_PARTS + 1) if not any(size % n for size in wanted)]


def _vocab_rows(config: ModelConfig, num_parts: int, totals: Mapping[str, int], num_shards: int) -> int | None:
    """Rows of a part's embedding, from what else is in the root; None where padding could be rows."""
    root, *layers = totals
    none = dataclasses.replace(config, vocab_size=0)
    rest = totals[root] - _laid_out(none, num_parts, root, layers)[0].numel
    width = config.hidden_dim * (1 if config.tied_output else 2)
    return rest // width if rest > 0 and num_shards <= width else None


def _whole(value: Any, default: int = 0) -> int:
    return value if type(value) is int and 0 < value < 1 << 24 else default


def _said(cfg: Mapping[str, Any]) -> ModelConfig | None:
    """The model that cfg describes, with OPT's vocabulary."""
    found = cfg.get("model")
    model: Mapping[str, Any] = found if isinstance(found, dict) else {}
    layers, width = _whole(model.get("decoder_layers")), _whole(model.get("decoder_embed_dim"))
    if not layers or not width or layers > 1024:
        return None
    window = _whole(model.get("max_target_positions")) or _whole(model.get("tokens_per_sample"), 2048)
    return ModelConfig(
        num_layers=layers,
        hidden_dim=width,
        num_heads=_whole(model.get("decoder_attention_heads")) or heads_from_shape(layers, width) or width,
        ffn_dim=_whole(model.get("decoder_ffn_embed_dim"), 4 * width),
        vocab_size=VOCAB_SIZE,
        max_positions=window,
        final_norm=model.get("decoder_normalize_before") is not False,
        tied_output=model.get("share_decoder_input_output_embed") is not False,
        bias=not model.get("disable_bias"),
    )


def _num_parts(cfg: Mapping[str, Any]) -> int:
    groups = [group for group in (cfg.get("common"), cfg.get("model")) if isinstance(group, dict)]
    return next((n for group in groups if (n := _whole(group.get("model_parallel_size")))), 0)


def _laid_out(config: ModelConfig, num_parts: int, root: str, layers: Sequence[str]) -> tuple[Unit, ...]:
    """The units of one part, under these keys: all in one, or a unit for each layer."""
    d, rows = config.hidden_dim, config.vocab_size // num_parts
    begin: _Shapes = {EMBED: (rows, d), POSITIONS: (config.max_positions + POSITION_OFFSET, d)}
    end: _Shapes = {f"decoder.layer_norm.{leaf}": (d,) for leaf in ("weight", "bias") if config.final_norm}
    if not config.tied_output:
        end[OUTPUT] = (rows, d)
    tied = ((EMBED, OUTPUT),) if config.tied_output else ()
    one = _layer(config, num_parts)
    if layers:
        units = [Unit("", root, tuple(begin | end), tuple((begin | end).values()), tied)]
        for key in layers:
            path, _, flat_name = key.rpartition(".")
            units.append(Unit(path, flat_name, tuple(f"{path}.{name}" for name in one), tuple(one.values())))
        return tuple(units)
    inner = {f"decoder.layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in one.items()}
    whole = begin | inner | end
    return (Unit("", root, tuple(whole), tuple(whole.values()), tied),)


def _layer(config: ModelConfig, num_parts: int) -> _Shapes:
    d, width, ffn = config.hidden_dim, config.hidden_dim // num_parts, config.ffn_dim // num_parts
    norm: _Shapes = {"weight": (d,), "bias": (d,)}
    modules: dict[str, _Shapes] = {
        "self_attn.qkv_proj": {"weight": (3 * width, d), "bias": (3 * width,)},
        "self_attn.out_proj": {"weight": (d, width), "bias": (d,)},
        "self_attn_layer_norm": norm,
        "fc1": {"weight": (ffn, d), "bias": (ffn,)},
        "fc2": {"weight": (d, ffn), "bias": (d,)},
        "final_layer_norm": norm,
    }
    return {
        f"{module}.{leaf}": shape
        for module, leaves in modules.items()
        for leaf, shape in leaves.items()
        if config.bias or leaf == "weight" or "norm" in module
    }
