"""Which files Meta published for which model, where they lie, and how many bytes their weights take.

Knows names, addresses and shapes. Does not know HTTP, nor the files' exact lengths: those are the server's to say, but
none can be much shorter than its weights. No checksums of weights: the published lists disagree with the files.
Source: metaseq projects/OPT/README.md (022ce35 for 2022, f7ffa5f for 2023), projects/OPT/download_opt175b.md,
projects/OPT-IML/README.md and projects/OPT-IML/download_optiml175b.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from metaseq_api.core.config import OPT_SHAPES, ModelConfig
from metaseq_api.errors import SettingsError

HOST = "https://dl.fbaipublicfiles.com"
TOKENIZER = "https://github.com/facebookresearch/metaseq/raw/main/projects/OPT/assets"
TOKENIZER_MD5 = {
    "gpt2-vocab.json": "cf410ee085c5c69c957bb1f6d8456596",
    "gpt2-merges.txt": "75a37753dd7a28a2c5df80c28bf06e4e",
}
EDITIONS = ("2022", "2023")
STUB = "stubbed.pt"
"""Stands for every file's name in the address that Meta sends for the 175B model."""
FP16 = 2


@dataclass(frozen=True, slots=True)
class File:
    """One file to fetch. `weights` is how many bytes its tensors take; `md5` is None where none can be trusted."""

    name: str
    url: str
    weights: int = 0
    md5: str | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """The files of one checkpoint, each with `weights` bytes of tensors; `base` is None where Meta sends it."""

    base: str | None
    names: tuple[str, ...]
    weights: int


def part_params(config: ModelConfig, num_parts: int) -> int:
    """How many parameters each part holds: matrices are split; norms, positions and row layers' biases are not."""
    d = config.hidden_dim
    replicated = (config.max_positions + 2) * d + 6 * d * config.num_layers + (2 * d if config.final_norm else 0)
    return replicated + (config.num_params - replicated) // num_parts


def _release(shape: str, base: str | None, names: Iterable[str], num_parts: int, num_shards: int = 1) -> Release:
    return Release(base, tuple(names), FP16 * part_params(OPT_SHAPES[shape], num_parts) // num_shards)


def _reshard(edition: str, size: str, num_parts: int) -> Release:
    names = [f"reshard-model_part-{j}.pt" for j in range(num_parts)]
    return _release(f"opt-{size}", f"{HOST}/opt/v1_{edition}/{size}", names, num_parts)


def _iml(shape: str, base: str | None, prefix: str, num_parts: int) -> Release:
    return _release(shape, base, [f"{prefix}-model_part-{j}.pt" for j in range(num_parts)], num_parts)


_IML_30B = "eps_4096.docsep_2.mu{0}.wu60.bsz8.clip1.0.fp32adam.rs1234.lr5e-05.pat_8000.ngpu64/mp2"
_350M = _release("opt-350m", f"{HOST}/opt/v1_20220502/350m", ["reshard.pt"], 1)
_175B = _release(
    "opt-175b", None, [f"checkpoint_last-model_part-{j}-shard{k}.pt" for j in range(8) for k in range(124)], 8, 124
)
RELEASES: dict[str, dict[str, Release]] = {
    # model: {edition: release}; the newest is last. 350M and 175B were not published again in 2023.
    "opt-125m": {"2022": _reshard("20220502", "125m", 2), "2023": _reshard("20230405", "125m", 1)},
    "opt-350m": {"2022": _350M, "2023": _350M},
    "opt-1.3b": {"2022": _reshard("20220502", "1.3b", 2), "2023": _reshard("20230405", "1.3b", 1)},
    "opt-2.7b": {"2022": _reshard("20220502", "2.7b", 4), "2023": _reshard("20230405", "2.7b", 1)},
    "opt-6.7b": {"2022": _reshard("20220502", "6.7b", 2), "2023": _reshard("20230405", "6.7b", 1)},
    "opt-13b": {"2022": _reshard("20220502", "13b", 2), "2023": _reshard("20230405", "13b", 2)},
    "opt-30b": {"2022": _reshard("20220502", "30b", 2), "2023": _reshard("20230405", "30b", 4)},
    "opt-66b": {"2022": _reshard("20221026", "66b", 8), "2023": _reshard("20230405", "66b", 8)},
    "opt-175b": {"2022": _175B, "2023": _175B},
    "opt-iml-30b": {
        "": _iml("opt-30b", f"{HOST}/optiml/aws.v7.prop10.30b.{_IML_30B.format(4000)}", "checkpoint_1_4000.pt", 2)
    },
    "opt-iml-max-30b": {
        "": _iml("opt-30b", f"{HOST}/optiml/aws.v7.2000.prop10.30b.{_IML_30B.format(6000)}", "checkpoint_1_6000.pt", 2)
    },
    "opt-iml-175b": {"": _iml("opt-175b", None, "checkpoint_1_8000", 16)},
    "opt-iml-max-175b": {"": _iml("opt-175b", None, "checkpoint_1_12000", 16)},
}


def files(
    model: str, *, edition: str | None = None, url: str | None = None, tokenizer_url: str | None = None
) -> list[File]:
    """List the files of a model and its tokenizer; `url` and `tokenizer_url` replace the addresses of Meta's folders.

    Raises: SettingsError where the model, its edition or its address is not known.
    """
    release = _find(model.lower(), edition)
    base = url or release.base
    if base is None:
        raise SettingsError(
            f"{model} is not public: Meta sends an address to those who ask; pass it as --url 'ADDRESS', in quotes "
            f"({len(release.names)} files, {release.names[0]} and so on)"
        )
    weights = [File(name, _address(base, name), release.weights) for name in release.names]
    assets = tokenizer_url or TOKENIZER
    return [*(File(name, _address(assets, name), md5=md5) for name, md5 in TOKENIZER_MD5.items()), *weights]


def _find(model: str, edition: str | None) -> Release:
    if model not in RELEASES:
        near = difflib.get_close_matches(model, RELEASES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"no model {model!r} is known; {hint}there are {', '.join(RELEASES)}")
    editions = RELEASES[model]
    if edition is None:
        return editions[max(editions)]
    if edition not in editions:
        known = " and ".join(filter(None, editions))
        raise SettingsError(
            f"{model} has {f'the editions {known}' if known else 'one edition'}, not {edition}; leave --edition out"
        )
    return editions[edition]


def _address(base: str, name: str) -> str:
    """The address of a file in the folder `base`; a last component stubbed.pt, or one with a star, stands for any name.

    A query stays where it is: it is what makes a pre-signed address valid.
    """
    try:
        parts = urlsplit(base)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    readable = base.isascii() and base.isprintable() and " " not in base and "@" not in parts.netloc and port != 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not readable:
        raise SettingsError(
            "an address is not one of HTTP; wanted https://host/folder, in quotes and without a user or password"
        )
    folder, _, last = parts.path.rpartition("/")
    if last and last != STUB and "*" not in last:
        folder = f"{folder}/{last}"
    return parts._replace(path=f"{folder}/{name}", fragment="").geturl()
