"""A folder of torch.distributed.checkpoint (DCP): which of the tensors in it make up an OPT, and its shape.

Does not know what made the files: FSDP2's `fully_shard`, tensor parallelism, or one process; nor how they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.dcp_metadata import METADATA, Metadata
from metaseq_api.checkpoint.dcp_optimizer import DcpOptimizer
from metaseq_api.checkpoint.hugging_face import CONFIG, our_name, read_config
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.errors import CheckpointMismatch

_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_EMBED = re.compile(rf"(?P<prefix>(?:.*\.)?){re.escape(rules.EMBED)}")
_ASIDE = re.compile(r"(^|\.)(optim|optimizer|ema)")
"""What lies beside the model in the same state dict."""


def is_dcp(folder: Path) -> bool:
    """Say whether a folder holds DCP's metadata and files."""
    return (folder / METADATA).is_file() and any(folder.glob("*.distcp"))


def open_dcp(folder: Path) -> WholeCheckpoint:
    """Open the model in a folder. Its names are metaseq's or Hugging Face's, under whatever prefix the trainer gave.

    What else its config should say is taken from a config.json beside it, else from metaseq's cfg in it.
    Raises: CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt, naming the file.
    """
    metadata = Metadata(folder)
    if (folder / CONFIG).is_file():
        said = {"tie_word_embeddings": True} | read_config(folder / CONFIG)
    else:  # where nobody says that the output is the embedding, it is taken as it is stored
        said = _words(_cfg(metadata))
    entries = {_WRAPPER.sub("", name): name for name in metadata.entries}
    names = _names(metadata, entries)
    if said.get("tie_word_embeddings") is True:
        names.pop(rules.OUTPUT, None)
    stored = {name: metadata.tensor(entry, name) for name, entry in names.items()}
    tensors = {third.name: third for tensor in stored.values() for third in tensor.thirds()}
    optimizer = DcpOptimizer(metadata, entries, names, {name: tensor.shape for name, tensor in stored.items()})
    return WholeCheckpoint.of(folder, "DCP", metadata.num_files, tensors, said, optimizer)


def _names(metadata: Metadata, entries: Mapping[str, str]) -> dict[str, str]:
    """Find the model in the state dict: the names of its tensors there, by their stored names in metaseq."""
    prefixes = {match["prefix"] for name in entries if (match := _EMBED.fullmatch(name))}
    chosen = {prefix for prefix in prefixes if not _ASIDE.search(prefix)} or prefixes
    if len(chosen) != 1:
        what = f"several ({', '.join(map(ascii, sorted(chosen)[:4]))})" if chosen else "none"
        raise CheckpointMismatch(
            f"{metadata.file.path} should list one OPT model, with a tensor ...{rules.EMBED}, and lists {what}"
        )
    (prefix,) = chosen
    out: dict[str, str] = {}
    head = prefix.removesuffix("model.") + "lm_head.weight"
    for name, stored in entries.items():
        if name.startswith(f"{prefix}decoder."):
            ours = our_name(name.removeprefix(prefix))
        elif name == head:
            ours = rules.OUTPUT
        else:
            continue
        if not rules.is_ignored(ours):
            out[ours] = stored
    return out


def _cfg(metadata: Metadata) -> dict[str, Any]:
    """What metaseq's configuration in the state dict says of the model."""
    out: dict[str, Any] = {}
    for name in metadata.entries:
        match = re.fullmatch(r"(?:.*\.)?cfg(?:\.model(?:\.(\w+))?)?", name)
        if match is None or not metadata.has_value(name):
            continue
        value = metadata.value(name)
        if name.endswith("cfg") and isinstance(value, dict):
            value = value.get("model")
        if match[1]:
            out[match[1]] = value
        elif isinstance(value, dict):
            out |= value
    return out


def _words(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's words for what metaseq's cfg says."""
    known = {
        "num_attention_heads": cfg.get("decoder_attention_heads"),
        "activation_function": {"gelu": "gelu_new"}.get(str(cfg.get("activation_fn")), cfg.get("activation_fn")),
        "do_layer_norm_before": cfg.get("decoder_normalize_before"),
        "tie_word_embeddings": cfg.get("share_decoder_input_output_embed"),
    }
    return {key: value for key, value in known.items() if value is not None}
