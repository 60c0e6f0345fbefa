"""Whether files are what their names say: this shard of this part, and no other.

Nothing in a shard states its number, so several things that depend on it are asked: the rank in the trainer's cfg, the
name the file was saved under, the padding, and the columns of its matrices. Each speaks only where it knows. Does not
look at what the numbers are worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.finding import Finding
from metaseq_api.checkpoint.folder import numbers
from metaseq_api.checkpoint.part import Header, Part
from metaseq_api.checkpoint.tensors import LocalTensor, Run

WITNESSES = (
    "decoder.embed_tokens.weight",
    "decoder.layers.0.self_attn.qkv_proj.weight",
    "decoder.layers.0.fc1.weight",
)
"""Matrices whose columns are those of the hidden state. A few tell enough: all units are cut into the same files."""
MIN_COLUMNS = 64
"""With fewer, columns may be alike by chance."""
MIN_ROWS, MAX_ROWS = 8, 4096
LIKE = 0.6
"""Columns whose sizes are correlated so much lie in the same order. By chance: below 0.36 for 64 columns."""
REMEDY = "are shards swapped or renamed?"


def misplaced(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find files that are at another one's place. Raises: CheckpointError where one cannot be read."""
    for part in checkpoint.parts:
        for header in part.headers:
            yield from _renamed(header)
            yield from _padding(header)
        yield from _ranks(part)
        if part.is_flat and part.num_shards > 1:
            yield from _shifted(part)


def _renamed(header: Header) -> Iterator[Finding]:
    """A file saved by its path has that name, short of what follows the last dot, as its records' folder."""
    path, saved = header.archive.path, header.archive.root
    mine, old = (numbers(Path(f"{name.removesuffix('.pt')}.pt"))[1:] for name in (path.name, saved))
    if any(None not in pair and pair[0] != pair[1] for pair in zip(mine, old, strict=True)):
        what = f"was written under the name {ascii(saved)[1:-1]}, that of another part or shard"
        yield Finding(path, f"{what}; {REMEDY}", fatal=False)


def _padding(header: Header) -> Iterator[Finding]:
    """What fills up a slice is zeros; other numbers there are another shard's."""
    for key, num_zeros in header.padding.items():
        slice_ = header.weights[key]
        if num_zeros and bool(header.archive.flat(slice_, slice_.numel - num_zeros, slice_.numel).any()):
            what = f"has other numbers than zeros among the {num_zeros} that fill up {key}"
            yield Finding(header.archive.path, f"{what}; {REMEDY}")


def _ranks(part: Part) -> Iterator[Finding]:
    """Every rank of a run saves its own number in cfg, and shards are numbered in the order of the ranks.

    Files that were resharded all have the first one's, which tells nothing. Source: metaseq/distributed/utils.py,
    `distributed_init`; metaseq/trainer.py, `state_dict`.
    """
    groups = [header.cfg.get("distributed_training") for header in part.headers]
    ranks = [group.get("distributed_rank") if isinstance(group, dict) else None for group in groups]
    known = [rank for rank in ranks if type(rank) is int]
    if len(known) < len(ranks) or len(set(known)) < len(known):
        return
    for header, rank, wanted in zip(part.headers, known, sorted(known), strict=True):
        if rank != wanted:
            what = f"was written by rank {rank}, and its place is that of rank {wanted}"
            yield Finding(header.archive.path, f"{what}; {REMEDY}")


def _shifted(part: Part) -> Iterator[Finding]:
    """Columns of a trained matrix differ in size, in every row alike; in another shard's place they are shifted."""
    for name in WITNESSES:
        if name in part.tensors and part.tensors[name].num_columns >= MIN_COLUMNS:
            found = list(_fits_elsewhere(part, part.tensors[name]))
            for path, other in found:
                what = f"does not fit its place: the columns of {name} lie in it as in shard {other}"
                yield Finding(path, f"{what}; {REMEDY}")
            if found:
                return


def _fits_elsewhere(part: Part, tensor: LocalTensor) -> Iterator[tuple[Path, int]]:
    """Files whose share of a matrix is unlike the others' where it is, and like them where another shard's would be."""
    width, shards = tensor.num_columns, {header.archive: shard for shard, header in enumerate(part.headers)}
    profiles = {run: profile for run in tensor.runs if (profile := _profile(run, width)) is not None}
    if len(profiles) < 2:
        return
    stacked = torch.stack(list(profiles.values()))
    alike = stacked @ stacked.T
    usual = stacked[alike[alike.sum(0).argmax()] > LIKE / 2].mean(0)
    usual = torch.fft.rfft(usual / usual.norm())
    for run, profile in profiles.items():
        by_shift = torch.fft.irfft(torch.fft.rfft(profile).conj() * usual, n=width)
        mine, length = shards[run.archive], run.stored.numel
        shifts = {other: (other - mine) * length % width for other in shards.values()}
        best = max(shifts, key=lambda other: float(by_shift[shifts[other]]))
        if by_shift[shifts[best]] > max(LIKE, 2 * float(by_shift[0])):
            yield run.archive.path, best


def _profile(run: Run, width: int) -> Tensor | None:
    """Which columns hold larger numbers than which, as a vector of length 1; by rank, since a few are outliers."""
    first, last = -(-run.start // width), run.stop // width
    if last - first < MIN_ROWS:
        return None
    rows = run.view(first * width, min(last, first + MAX_ROWS) * width).view(-1, width)
    ranks = rows.float().abs().mean(0).argsort().argsort().float()
    return torch.nn.functional.normalize(ranks - ranks.mean(), dim=0)
