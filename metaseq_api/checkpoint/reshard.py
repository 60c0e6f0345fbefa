"""Changes how a checkpoint is cut: into shards of a part, or into parts; weights and optimizer state alike.

A job reads headers and checks everything first, then writes one file after the other, number by number from the old
places to the new ones. What else is in the files comes from the first one, as plain data and Namespaces.

- A shared parameter (the tied output projection) is there again under its second name when weights are unflattened;
  it takes no room, both names have one storage.
- Moments stay flat vectors, one for each FSDP unit as metaseq keeps them, without padding where weights are
  unflattened. They keep their dtype whatever the weights' new one.
- What belongs to one rank and cannot be joined (random states, averaged weights) or is an object of a class that only
  metaseq has, is left out, and one line in the log names it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaseq_api.checkpoint import rules, write
from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.contents import Form, NewPart, Source, contents
from metaseq_api.checkpoint.folder import collect, numbers
from metaseq_api.checkpoint.part import Header, Part
from metaseq_api.checkpoint.tensors import LogicalTensor
from metaseq_api.checkpoint.write import CHUNK
from metaseq_api.errors import ParallelSizeError, SettingsError
from metaseq_api.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recut:
    """One part's share of a whole stored tensor, `thirds` its logical tensors (one, or three of a fused qkv_proj)."""

    thirds: tuple[LogicalTensor, ...]
    part: int
    num_parts: int

    @property
    def dtype(self) -> torch.dtype:
        return self.thirds[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self._extent(self.thirds[0])
        return (len(rows) * len(self.thirds), len(columns))[: len(self.thirds[0].shape)]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def flat(self, start: int, stop: int) -> Iterator[Tensor]:
        """Copy numbers start to stop of the share, a block of rows at a time."""
        for index, tensor in enumerate(self.thirds):
            rows, columns = self._extent(tensor)
            width, each = len(columns), len(rows) * len(columns)
            at, end = max(start - index * each, 0), min(stop - index * each, each)
            step = max(1, CHUNK // (width * self.dtype.itemsize))
            for row in range(at // width, -(-end // width) if end > at else 0, step):
                last = min(row + step, -(-end // width))
                block = tensor.box(rows[row:last], columns).reshape(-1)
                yield block[max(at - row * width, 0) : end - row * width]

    def _extent(self, tensor: LogicalTensor) -> tuple[range, range]:
        extents = [range(n) for n in (*tensor.shape, 1)[:2]]
        if tensor.split is not None:
            each = tensor.shape[tensor.split] // self.num_parts
            extents[tensor.split] = range(self.part * each, (self.part + 1) * each)
        return extents[0], extents[1]


def reshard_fsdp(
    inputs: Sequence[Path],
    output: str,
    *,
    num_output_shards: int = 1,
    form: Form,
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
) -> list[Path]:
    """Cut one part into `num_output_shards` shards, named by `{i}` in `output`.

    progress: told how many bytes there are to write, it gives what is told how many were written.
    Raises: SettingsError, CheckpointError, ResourceError; before anything is written, but for the last.
    """
    if form.unflatten and num_output_shards != 1:
        raise SettingsError(
            f"--num-output-shards {num_output_shards} cannot be unflattened; give --unflatten-weights False or 1 shard"
        )
    paths = _outputs(inputs, output, num_output_shards, "--num-output-shards")
    parts = {number for _, number, _ in map(numbers, inputs)}
    if len(parts) > 1:
        raise SettingsError(
            f"--input matches files of {len(parts)} parts, such as {inputs[0]} and {inputs[-1]}; "
            "name the shards of one part at a time"
        )
    (shards,) = collect(inputs, one_part=True).files
    part = Part(Header.read_all(shards))
    new = NewPart(tensors=part.tensors, moments=_wanted(part, form), units=part.units, like=part)
    lost: list[str] = []
    trees = [contents(new, shard, num_output_shards, form, lost) for shard in range(num_output_shards)]
    _save(trees, paths, lost, progress)
    return paths


def reshard_mp(
    inputs: Sequence[Path],
    output: str,
    *,
    num_output_parts: int = 1,
    eps: float = 1e-8,
    form: Form,
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
) -> list[Path]:
    """Cut a model into `num_output_parts` parts, named by `{i}` in `output`.

    eps: the difference between parts' copies of one tensor that is not worth a word.
    Raises: ParallelSizeError, SettingsError, CheckpointError, ResourceError; before anything is written, but for the
    last.
    """
    paths = _outputs(inputs, output, num_output_parts, "--num-output-parts")
    checkpoint = Checkpoint(collect(inputs))
    try:
        checkpoint.config.check_parallel(num_output_parts)
    except ParallelSizeError as error:
        raise ParallelSizeError(str(error).replace("--model-parallel", "--num-output-parts")) from None
    _compare_copies(checkpoint, eps)
    new = [_recut(checkpoint, index, num_output_parts, form) for index in range(num_output_parts)]
    lost: list[str] = []
    _save([contents(part, 0, 1, form, lost) for part in new], paths, lost, progress)
    return paths


def _outputs(inputs: Sequence[Path], output: str, count: int, flag: str) -> list[Path]:
    if count < 1:
        raise SettingsError(f"{flag} is {count}; it must be 1 or more")
    if count > 1 and "{i}" not in output:
        raise SettingsError(f"--output {output} names one file, and {flag} {count} makes several; put {{i}} into it")
    paths = [Path(output.replace("{i}", str(i))) for i in range(count)]
    for path in paths:
        if path.is_dir():
            raise SettingsError(f"--output {path} is a folder; name a file in it")
        if path.resolve() in {given.resolve() for given in inputs}:
            raise SettingsError(f"--output {path} is one of the inputs, which are still needed; name another file")
    return paths


def _save(
    trees: Sequence[Any], paths: Sequence[Path], lost: Sequence[str], progress: Callable[[int], Progress]
) -> None:
    if lost:
        log.warning("not kept: %s", ", ".join(ascii(name)[1:-1] for name in dict.fromkeys(lost)))
    told = progress(sum(stream.num_bytes for tree in trees for stream in write.streams(tree)))
    for tree, path in zip(trees, paths, strict=True):
        write.save(tree, path, told)


def _wanted(part: Part, form: Form) -> Mapping[str, Mapping[str, Source]]:
    return {} if form.skip_optimizer_state else part.moments


def _recut(checkpoint: Checkpoint, index: int, num_parts: int, form: Form) -> NewPart:
    like = checkpoint.parts[0]

    def cut(stored: Iterable[str], whole: Mapping[str, LogicalTensor]) -> dict[str, Source]:
        return {name: Recut(tuple(whole[n] for n in rules.logical_names(name)), index, num_parts) for name in stored}

    whole = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    tensors = cut(like.tensors, whole)
    moments = {} if form.skip_optimizer_state else checkpoint.moments()
    units = tuple(replace(unit, shapes=tuple(tensors[name].shape for name in unit.names)) for unit in like.units)
    return NewPart(
        tensors=tensors,
        moments={kind: cut(like.moments[kind], vectors) for kind, vectors in moments.items()},
        units=units,
        like=like,
        num_parts=num_parts,
    )


def _compare_copies(checkpoint: Checkpoint, eps: float) -> None:
    """Warn where parts hold different copies of a tensor that each holds whole; the first part's is taken."""
    for name, local in checkpoint.parts[0].tensors.items():
        if rules.split_dim(rules.logical_names(name)[0]) is not None:
            continue
        mine = torch.cat(list(local.flat(0, local.numel))).float()
        for part in checkpoint.parts[1:]:
            other = torch.cat(list(part.tensors[name].flat(0, local.numel))).float()
            differ = float((mine - other).abs().max())
            if not differ <= eps:
                path = part.first.archive.path
                log.warning("%s in %s differs by %g from the first part's, which is taken", name, path, differ)
