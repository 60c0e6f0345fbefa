"""Reads a whole checkpoint and says what is wrong with its numbers.

Opening has already held lengths against shapes, padding, runs and models; this looks at every number, a piece at a
time. Knows what an OPT's weights look like. Does not know where findings are shown, or how to mend them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.rules import split_dim
from metaseq_api.checkpoint.tensors import LocalTensor
from metaseq_api.checkpoint.whole import BoxedTensor, WholeCheckpoint
from metaseq_api.progress import Progress

PIECE = 8 << 20
"""Units: numbers looked at together."""
SAME = 1e-8
"""Copies of one tensor in several parts may differ so much without a word. Source: metaseq's reshard_mp --eps."""
GROSS = 0.1
"""A difference between copies that no rounding makes."""
GLANCE = 1 << 16
"""Units: numbers of a tensor that a glance compares."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or, where it is not `fatal`, only remarkable."""

    path: Path
    what: str
    fatal: bool = True


def verify(
    checkpoint: Checkpoint | WholeCheckpoint, progress: Callable[[int], Progress] = lambda total: lambda done: None
) -> list[Finding]:
    """Look at every number. Raises: CheckpointCorrupt where a file cannot be read."""
    if isinstance(checkpoint, WholeCheckpoint):
        tell = progress(checkpoint.num_bytes)
        return [f for t in checkpoint.tensors.values() for f in _look(checkpoint.path, t.name, _rows(t), tell)]
    locals_ = [(part.first.archive.path, t) for part in checkpoint.parts for t in part.tensors.values()]
    tell = progress(sum(t.numel * t.dtype.itemsize for _, t in locals_))
    found = [*_repeated_shards(checkpoint), *_repeated_parts(checkpoint)]
    for path, tensor in locals_:
        found += _look(path, tensor.name, _pieces(tensor), tell)
    return found + list(copies(checkpoint, checkpoint.parts[0].tensors))


def glance(checkpoint: Checkpoint) -> list[Finding]:
    """Look at so few numbers that a service may do it at every start: three layer norms, and heads of large tensors.

    Finds files that were swapped or copied over each other, and parts of different runs; not damage inside a tensor.
    """
    last = checkpoint.config.num_layers - 1
    norms = (
        "decoder.layer_norm.weight",
        "decoder.layers.0.self_attn_layer_norm.weight",
        f"decoder.layers.{last}.final_layer_norm.weight",
    )
    present = [n for n in norms if n in checkpoint.parts[0].tensors]
    found = [*_repeated_shards(checkpoint, limit=GLANCE), *_repeated_parts(checkpoint, limit=GLANCE)]
    found += copies(checkpoint, present)
    for part in checkpoint.parts:
        for name in present:
            looks = _look(part.first.archive.path, name, _pieces(part.tensors[name]), lambda done: None)
            found += [replace(f, fatal=False) for f in looks]
    return found


def _pieces(tensor: LocalTensor) -> Iterator[Tensor]:
    for start in range(0, tensor.numel, PIECE):
        yield from tensor.flat(start, min(start + PIECE, tensor.numel))


def _rows(tensor: BoxedTensor) -> Iterator[Tensor]:
    step = max(1, PIECE // max(1, tensor.numel // max(1, tensor.shape[0])))
    for row in range(0, tensor.shape[0], step):
        yield tensor.read(0, row, min(row + step, tensor.shape[0]))


def _look(path: Path, name: str, pieces: Iterable[Tensor], tell: Progress) -> Iterator[Finding]:
    """NaN and Inf; and a layer norm's weights, which are about 1, where the numbers are not about 1.

    The last is how shards in the wrong order show: each parameter then holds another one's numbers.
    """
    total, peak, num, bad = 0.0, 0.0, 0, None
    for piece in pieces:
        numbers = piece.reshape(-1).float()
        if bad is None and not bool(numbers.isfinite().all()):
            at = int((~numbers.isfinite()).nonzero()[0])
            bad = f"{name} holds {numbers[at].item()}"
        total += float(numbers.sum(dtype=torch.float64))
        peak = max(peak, float(numbers.abs().max()))
        num += numbers.numel()
        tell(numbers.numel() * piece.dtype.itemsize)
    if bad is not None:
        yield Finding(path, f"{bad}, which is no weight; fetch the file again, or train from an earlier one")
    elif name.endswith("norm.weight") and num and not 0.05 < total / num < 50:
        what = f"{name} has a mean of {total / num:.2g}, where a layer norm's weights are about 1"
        yield Finding(path, f"{what}: are shards swapped or renamed?")
    elif peak == 0 and not name.endswith("bias"):
        yield Finding(path, f"{name} is all zeros; was the file written to its end?")


def _repeated_shards(checkpoint: Checkpoint, limit: int | None = None) -> Iterator[Finding]:
    """Two shards with the same (first `limit`) numbers, of one part or of two: one was copied over the other.

    A layer's slice is looked at, since parts may share whole slices of the root: each holds all of embed_positions.
    """
    replicated = 8 * checkpoint.config.hidden_dim  # more than what a layer's parts have in common
    seen: dict[bytes, tuple[int, Path]] = {}
    for index, part in enumerate(checkpoint.parts):
        if not part.is_flat or part.num_shards == 1:
            continue
        unit = max(part.units, key=lambda u: ("layers" in u.path, u.numel))
        for header in part.headers:
            numbers = header.archive.view(header.weights[unit.key])[:limit]
            if not bool(numbers.any()):
                continue  # nothing but padding
            other, path = seen.setdefault(_digest(numbers), (index, header.archive.path))
            if path != header.archive.path and (other == index or numbers.numel() > replicated):
                yield Finding(header.archive.path, f"holds the same numbers as {path}; fetch one of them again")


def _repeated_parts(checkpoint: Checkpoint, limit: int | None = None) -> Iterator[Finding]:
    """Two parts with the same (first `limit`) numbers of a tensor that is split: one was copied over the other."""
    seen: dict[bytes, Path] = {}
    for part in checkpoint.parts if checkpoint.num_parts > 1 else ():
        tensor = part.tensors["decoder.layers.0.fc1.weight"]
        numbers = torch.cat(list(tensor.flat(0, min(limit or tensor.numel, tensor.numel))))
        path, key = part.first.archive.path, _digest(numbers)
        if key in seen and bool(numbers.any()):
            yield Finding(path, f"holds the same part of the model as {seen[key]}; fetch one of them again")
        seen[key] = path


def _digest(numbers: Tensor) -> bytes:
    return hashlib.blake2b(numbers.contiguous().view(torch.uint8).numpy().data).digest()


def copies(checkpoint: Checkpoint, names: Iterable[str], eps: float = SAME) -> Iterator[Finding]:
    """Tensors that every part holds must agree; metaseq takes part 0's."""
    first = checkpoint.parts[0]
    for name in names:
        mine = first.tensors[name]
        if ".qkv_proj." in name or split_dim(name) is not None:
            continue
        for part in checkpoint.parts[1:]:
            worst = max((_apart(mine, part.tensors[name], at) for at in range(0, mine.numel, PIECE)), default=0.0)
            if math.isfinite(worst) and worst > eps:
                path = part.first.archive.path
                what = f"{name} differs by up to {worst:.1g} from that of {first.first.archive.path}, which is taken"
                yield Finding(path, what, fatal=worst > GROSS)


def _apart(a: LocalTensor, b: LocalTensor, start: int) -> float:
    stop = min(start + PIECE, a.numel)
    one, two = (torch.cat([p.float() for p in t.flat(start, stop)]) for t in (a, b))
    return float((one - two).abs().max())
