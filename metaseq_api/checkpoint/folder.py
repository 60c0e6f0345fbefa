"""Finds the files that make one checkpoint, by the parts and shards in their names.

Knows the names that metaseq and its scripts give: `PREFIX[-model_part-J][-shardK].pt`, where PREFIX may itself contain
".pt". Does not open a file: what a set of files holds is decided by what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.errors import CheckpointMismatch, CheckpointNotFound

_NAME = re.compile(r"(?P<prefix>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
PREFERRED = ("reshard", "restored", "checkpoint_last")
"""Which of several checkpoints in a folder is meant: what was made for serving comes before what training left."""


@dataclass(frozen=True, slots=True)
class FileSet:
    """All files of one checkpoint: `files[part][shard]`."""

    prefix: str
    files: tuple[tuple[Path, ...], ...]

    @property
    def num_parts(self) -> int:
        return len(self.files)

    @property
    def num_shards(self) -> int:
        return len(self.files[0])


def numbers(path: Path) -> tuple[str, int | None, int | None]:
    """Take a file name apart: prefix, part, shard; None for a number that it does not have."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return path.name, None, None
    part, shard = match["part"], match["shard"]
    return match["prefix"], None if part is None else int(part), None if shard is None else int(shard)


def with_numbers(path: Path, part: int | None = None, shard: int | None = None) -> Path:
    """The name a sibling of `path` would have."""
    name = path.name
    if part is not None:
        name = re.sub(r"-model_part-\d+(?=(-shard\d+)?\.pt$)", f"-model_part-{part}", name)
    if shard is not None:
        name = re.sub(r"-shard\d+(?=\.pt$)", f"-shard{shard}", name)
    return path.with_name(name)


def find(path: Path) -> FileSet:
    """Find the checkpoint that a folder, a file, or metaseq's `folder/reshard.pt` stands for.

    Raises: CheckpointNotFound naming what is missing, CheckpointMismatch where several could be meant.
    """
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder} does not exist; name a folder of checkpoint files, or one of them")
    groups: dict[tuple[str, bool, bool], list[Path]] = {}
    for file in sorted(folder.glob("*.pt")):
        prefix, part, shard = numbers(file)
        groups.setdefault((prefix, part is None, shard is None), []).append(file)
    if path.is_file():
        prefix, part, shard = numbers(path)
        # A name without numbers that does not end in .pt is still a file that was named.
        return collect(groups.get((prefix, part is None, shard is None), [path]))
    if not groups:
        where = path if path.is_dir() else f"{path} does not exist, and {folder}"
        raise CheckpointNotFound(f"{where} holds no .pt file; name the folder that has the checkpoint's files")
    if not path.is_dir():
        chosen = [files for (prefix, _, _), files in groups.items() if path.name in (prefix, f"{prefix}.pt")]
        if not chosen:
            names = ", ".join(sorted({f"{prefix}.pt" for prefix, _, _ in groups}))
            raise CheckpointNotFound(f"{path} does not exist; what is in {folder} goes by {names}, all parts together")
    else:
        chosen = list(groups.values())
        for prefix in PREFERRED:
            same = [files for (found, _, _), files in groups.items() if found == prefix]
            if same and len(chosen) > 1:
                chosen = same
    if len(chosen) > 1:
        first = ", ".join(files[0].name for files in chosen[:4])
        raise CheckpointMismatch(f"{folder} holds several checkpoints ({first}); name one of these files")
    return collect(chosen[0])


def collect(paths: Iterable[Path], *, one_part: bool = False) -> FileSet:
    """Put files of one checkpoint in order; with `one_part` they are the shards of one part, whichever it is.

    Raises: CheckpointNotFound where a part or shard between them is missing, CheckpointMismatch where one is doubled.
    """
    found: dict[tuple[int, int], Path] = {}
    prefix = ""
    for path in paths:
        prefix, part, shard = numbers(path)
        key = (0 if one_part else part or 0, shard or 0)
        if key in found:
            raise CheckpointMismatch(
                f"{found[key]} and {path} have the same part and shard; name one checkpoint's files"
            )
        found[key] = path
    num_parts = 1 + max(part for part, _ in found)
    num_shards = 1 + max(shard for _, shard in found)
    example = next(iter(found.values()))
    for part in range(num_parts):
        for shard in range(num_shards):
            if (part, shard) not in found:
                missing = with_numbers(example, None if one_part else part, shard)
                raise CheckpointNotFound(
                    f"{missing} is missing: the other files are of {num_parts} parts x {num_shards} shards; fetch it"
                )
    return FileSet(prefix, tuple(tuple(found[p, s] for s in range(num_shards)) for p in range(num_parts)))
