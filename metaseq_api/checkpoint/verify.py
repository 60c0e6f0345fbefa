"""Reads a whole checkpoint and says what is wrong with its numbers.

Opening has already held lengths against shapes, padding, runs and models; this looks at every number, a piece at a
time. Knows what an OPT's weights look like. Does not know where findings are shown, or how to mend them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from metaseq_api.checkpoint import hugging_face
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.crc import Checker
from metaseq_api.checkpoint.finding import Finding
from metaseq_api.checkpoint.order import misplaced
from metaseq_api.checkpoint.part import Header, Part, optimizer_entry
from metaseq_api.checkpoint.rules import split_dim
from metaseq_api.checkpoint.tensors import LocalTensor
from metaseq_api.checkpoint.unpickle import StoredTensor
from metaseq_api.checkpoint.whole import BoxedTensor, WholeCheckpoint
from metaseq_api.progress import Progress

PIECE = 8 << 20
"""Units: numbers looked at together."""
SAME = 1e-8
"""Copies of one tensor in several parts may differ so much without a word. Source: metaseq's reshard_mp --eps."""
GROSS = 0.1
"""A difference between copies that no rounding makes."""
STRETCH = 512
"""So many zeros in a row are in no trained matrix, and in any page of 4096 bytes that was lost."""
HEAD = 4
"""Rows by which two layers are told apart."""
GLANCE = 1 << 16
"""Units: numbers of a tensor that a glance compares."""


def verify(
    checkpoint: Checkpoint | WholeCheckpoint, progress: Callable[[int], Progress] = lambda total: lambda done: None
) -> list[Finding]:
    """Look at every number, the optimizer's too, and hold every record against its checksum.

    Raises: CheckpointError where a file cannot be read, or the optimizer's vectors are not as long as the weights.
    """
    if isinstance(checkpoint, WholeCheckpoint):
        return list(_whole(checkpoint, progress))
    return list(_parts(checkpoint, progress))


def _parts(checkpoint: Checkpoint, progress: Callable[[int], Progress]) -> Iterator[Finding]:
    archives = [header.archive for part in checkpoint.parts for header in part.headers]
    tensors = list(chain.from_iterable(_tensors(part) for part in checkpoint.parts))
    num_bytes = sum(t.numel * t.dtype.itemsize for _, t in tensors)
    tell = progress(num_bytes + sum(sum(a.record_sizes.values()) for a in archives if a.checksums))
    yield from misplaced(checkpoint)
    yield from _repeated_shards(checkpoint)
    yield from _repeated_parts(checkpoint)
    checker = Checker(tell)
    for name, tensor in tensors:
        for run in tensor.runs:  # a record is in the page cache when its numbers are looked at
            yield from checker.record(run.archive, run.archive.check(run.stored))
        yield from _look(name, _pieces(tensor), tell)
    for archive in archives:
        yield from checker.rest(archive)
    for part in checkpoint.parts:
        heads = (
            (n, t.runs[0].archive.path, _first(t, HEAD * t.num_columns)) for n, t in part.tensors.items() if t.runs
        )
        yield from _repeated_layers(heads)
    yield from copies(checkpoint, checkpoint.parts[0].tensors)


def _whole(checkpoint: WholeCheckpoint, progress: Callable[[int], Progress]) -> Iterator[Finding]:
    folder = checkpoint.path
    files = hugging_face.weight_files(folder)[1] if hugging_face.is_hugging_face(folder) else []
    archives = [Archive(path) for path in files if path.suffix == ".bin"]
    tell = progress(checkpoint.num_bytes + sum(sum(a.record_sizes.values()) for a in archives if a.checksums))
    checker = Checker(tell)
    for archive in archives:
        yield from checker.rest(archive)
    for name, tensor in checkpoint.tensors.items():
        yield from _look(name, ((checkpoint.path, piece) for piece in _rows(tensor)), tell)
    yield from _repeated_layers((n, folder, t.read(0, 0, min(HEAD, t.shape[0]))) for n, t in checkpoint.tensors.items())


def _tensors(part: Part) -> Iterator[tuple[str, LocalTensor]]:
    """All vectors of a part by what they are called, weights first."""
    yield from part.tensors.items()
    for kind, tensors in part.moments.items():
        yield from ((f"{kind} of {name}", tensor) for name, tensor in tensors.items())


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
            looks = _look(name, _pieces(part.tensors[name]), lambda done: None)
            found += [replace(f, fatal=False) for f in looks]
    return found


def _pieces(tensor: LocalTensor) -> Iterator[tuple[Path, Tensor]]:
    for run in tensor.runs:
        for start in range(run.start, run.stop, PIECE):
            yield run.archive.path, run.view(start, min(start + PIECE, run.stop))


def _rows(tensor: BoxedTensor) -> Iterator[Tensor]:
    step = max(1, PIECE // max(1, tensor.numel // max(1, tensor.shape[0])))
    for row in range(0, tensor.shape[0], step):
        yield tensor.read(0, row, min(row + step, tensor.shape[0]))


def _look(name: str, pieces: Iterable[tuple[Path, Tensor]], tell: Progress) -> Iterator[Finding]:
    """Numbers that cannot be: NaN and Inf; a layer norm's weights, which are about 1, where they are not about 1;
    the mean of squares below 0; long stretches of zeros, but in tables, whose unused rows are zeros.

    A norm is how shards in the wrong order show: each parameter then holds another one's numbers.
    """
    total, peak, num, num_zeros, path, bad = 0.0, 0.0, 0, 0, None, False
    for source, piece in pieces:
        path = path or source
        numbers = piece.reshape(-1).float()
        if not bad:
            what = _impossible(name, numbers)
            bad = what is not None
            if what is not None:
                yield Finding(source, f"{name} holds {what}; fetch the file again, or train from an earlier one")
        total += float(numbers.sum(dtype=torch.float64))
        peak = max(peak, float(numbers.abs().max()))
        num += numbers.numel()
        num_zeros += _zeros(numbers)
        tell(numbers.numel() * piece.dtype.itemsize)
    if bad or path is None or " of " in name:
        return
    if name.endswith("norm.weight") and not 0.05 < total / num < 50:
        what = f"{name} has a mean of {total / num:.2g}, where a layer norm's weights are about 1"
        yield Finding(path, f"{what}: are shards swapped or renamed?")
    elif peak == 0 and not name.endswith("bias"):
        yield Finding(path, f"{name} is all zeros; was the file written to its end?")
    elif num_zeros and "embed_" not in name:
        what = f"{name} has at least {num_zeros} zeros in stretches of {STRETCH} or more"
        yield Finding(path, f"{what}; was the file written to its end?", fatal=False)


def _impossible(name: str, numbers: Tensor) -> str | None:
    """What no training leaves in a weight or a moment."""
    if not bool(numbers.isfinite().all()):
        return f"{numbers[~numbers.isfinite()][0].item()}, which is no weight"
    if name.startswith("exp_avg_sq ") and bool((numbers < 0).any()):
        return f"{numbers.min().item():.2g}, where squares are averaged"
    return None


def _zeros(numbers: Tensor) -> int:
    """Numbers in stretches of zeros: pages that were never written."""
    stretches = numbers[: numbers.numel() // STRETCH * STRETCH].view(-1, STRETCH)
    return STRETCH * int((~stretches.any(1)).sum())


def _repeated_shards(checkpoint: Checkpoint, limit: int | None = None) -> Iterator[Finding]:
    """Two shards with the same (first `limit`) numbers, of one part or of two: one was copied over the other.

    A layer's slice is looked at, since parts may share whole slices of the root: each holds all of embed_positions.
    """
    replicated = 8 * checkpoint.config.hidden_dim  # more than what a layer's parts have in common
    seen: dict[bytes, tuple[int, Path]] = {}
    told: set[Path] = set()
    for index, part in enumerate(checkpoint.parts):
        if not part.is_flat or part.num_shards == 1:
            continue
        unit = max(range(len(part.units)), key=lambda i: ("layers" in part.units[i].path, part.units[i].numel))
        for header in part.headers:
            path = header.archive.path
            for what, stored in _slices(header, part.units[unit].key, unit):
                numbers = header.archive.flat(stored, 0, min(limit or stored.numel, stored.numel))
                if not bool(numbers.any()):
                    continue  # nothing but padding
                other, first = seen.setdefault(what.encode() + _digest(numbers), (index, path))
                if first != path and (other == index or numbers.numel() > replicated) and path not in told:
                    told.add(path)
                    yield Finding(path, f"holds the same {what} as {first}; fetch one of them again")


def _slices(header: Header, key: str, unit: int) -> Iterator[tuple[str, StoredTensor]]:
    yield "numbers", header.weights[key]
    for kind, stored in optimizer_entry(header, unit).items():
        if isinstance(stored, StoredTensor) and stored.shape:
            header.archive.check(stored)
            yield f"optimizer state ({kind})", stored


def _repeated_parts(checkpoint: Checkpoint, limit: int | None = None) -> Iterator[Finding]:
    """Two parts with the same (first `limit`) numbers of a tensor that is split: one was copied over the other."""
    seen: dict[bytes, Path] = {}
    for part in checkpoint.parts if checkpoint.num_parts > 1 else ():
        tensor = part.tensors["decoder.layers.0.fc1.weight"]
        numbers = _first(tensor, limit or tensor.numel)
        path, key = part.first.archive.path, _digest(numbers)
        if key in seen and bool(numbers.any()):
            yield Finding(path, f"holds the same part of the model as {seen[key]}; fetch one of them again")
        seen[key] = path


def _repeated_layers(heads: Iterable[tuple[str, Path, Tensor]]) -> Iterator[Finding]:
    """Two layers that begin with the same numbers: not impossible, since some are made so."""
    seen: dict[bytes, str] = {}
    for name, path, numbers in heads:
        if name.endswith(".fc1.weight") and bool(numbers.any()):
            first = seen.setdefault(_digest(numbers), name)
            if first != name:
                yield Finding(path, f"{name} begins with the numbers of {first}; was a layer copied?", fatal=False)


def _first(tensor: LocalTensor, count: int) -> Tensor:
    return torch.cat(list(tensor.flat(0, min(count, tensor.numel))))


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
