"""Which tensors an OPT has, what they are called, and how metaseq splits each over tensor-parallel parts.

A *stored* name is the one in the file; a *logical* name is ours. They are the same but for the fused `qkv_proj`, whose
rows in every part are keys, then values, then queries: three logical tensors. So each logical tensor is split along
dimension 0, along dimension 1, or copied to every part. Knows names only; does not know tensors or files.

Source: metaseq's modules; its reshard_mp.py copies an output_projection, which is a vocabulary split like embed_tokens.
"""

from __future__ import annotations

import re

from metaseq_api.errors import CheckpointMismatch

EMBED = "decoder.embed_tokens.weight"
POSITIONS = "decoder.embed_positions.weight"
OUTPUT = "decoder.output_projection.weight"
VERSION = "decoder.version"

QKV = ("k_proj", "v_proj", "q_proj")
"""The order of the thirds of a fused `qkv_proj`."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_fpw_module)\.")
_IGNORED = re.compile(r"decoder\.version|.*\._float_tensor")
_LAYER = r"decoder\.layers\.\d+\."
_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_THIRD = re.compile(r"self_attn\.[qkv]_proj\.")
_MODULES = (
    "embed_tokens",
    "project_in_dim",
    "embed_positions",
    "layers",
    "layer_norm",
    "project_out_dim",
    "output_projection",
)
_LAYER_MODULES = (
    "self_attn.qkv_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "self_attn_layer_norm",
    "fc1",
    "fc2",
    "final_layer_norm",
)
_SPLIT: tuple[tuple[re.Pattern[str], int | None], ...] = (
    (re.compile(r"decoder\.(embed_tokens|output_projection)\.weight"), 0),
    (re.compile(r"decoder\.(embed_positions|project_in_dim|project_out_dim)\.weight"), None),
    (re.compile(r"decoder\.layer_norm\.(weight|bias)"), None),
    (re.compile(_LAYER + r"self_attn\.[qkv]_proj\.(weight|bias)"), 0),
    (re.compile(_LAYER + r"fc1\.(weight|bias)"), 0),
    (re.compile(_LAYER + r"(self_attn\.out_proj|fc2)\.weight"), 1),
    (re.compile(_LAYER + r"(self_attn\.out_proj|fc2)\.bias"), None),
    (re.compile(_LAYER + r"(self_attn_layer_norm|final_layer_norm)\.(weight|bias)"), None),
)


def clean(name: str) -> str:
    """Take fairscale's wrapper modules out of a stored name."""
    return _WRAPPERS.sub("", name)


def is_ignored(stored: str) -> bool:
    """Say whether a stored tensor is a marker that no computation needs."""
    return _IGNORED.fullmatch(stored) is not None


def logical_names(stored: str) -> tuple[str, ...]:
    """List the logical tensors in a stored one, in the order of its rows."""
    if ".qkv_proj." not in stored:
        return (stored,)
    return tuple(stored.replace("qkv_proj", third) for third in QKV)


def fused_name(stored: str) -> tuple[str, ...]:
    """Give the stored tensor in which a logical one lies where q, k and v are fused."""
    return (_THIRD.sub("self_attn.qkv_proj.", stored),)


def registered(stored: str) -> tuple[int, int, int, int]:
    """Where a tensor stands in the order in which metaseq's modules register theirs: a key to sort by."""
    layer = _IN_LAYER.fullmatch(stored)
    module, _, leaf = (layer[2] if layer else stored.removeprefix("decoder.")).rpartition(".")
    if layer:
        return _MODULES.index("layers"), int(layer[1]), _place(module, _LAYER_MODULES), int(leaf != "weight")
    return _place(module, _MODULES), 0, 0, int(leaf != "weight")


def _place(module: str, order: tuple[str, ...]) -> int:
    return order.index(module) if module in order else len(order)


def split_dim(logical: str) -> int | None:
    """Say along which dimension parts hold a logical tensor; None where each holds it all.

    Raises: CheckpointMismatch for a name that no OPT has.
    """
    for pattern, dim in _SPLIT:
        if pattern.fullmatch(logical):
            return dim
    raise CheckpointMismatch(f"tensor {logical} is in no OPT model; is this a checkpoint of another architecture?")
