"""How fast ranks read a checkpoint to serve it, beside a plain read of the same bytes, and what follows the reading.

Makes files of three layouts that hold weights and nothing else, so that all ranks together need every byte of them.
Every rank is a process of its own; all begin at one word, and the time is that of the last. Three ways:

- plain: each of as many processes reads its share of the files' bytes in order, in large pieces, into memory that it
  keeps, as a loader must;
- read: each rank opens the checkpoint and reads the slices that the model asks for, and keeps none (device "meta");
- load: the same with what follows: the slices are cast, and on a CPU packed for oneDNN.

Cold: the files' pages were dropped from the cache before (posix_fadvise, which needs no root); the host of a virtual
machine may still have them. Warm: they were read just before. Does not print.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from metaseq_api.bench.children import child_of
from metaseq_api.bench.reshard import check_room, drop, make_shards
from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.checkpoint import DTYPES
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.reshard import reshard_fsdp, reshard_mp
from metaseq_api.checkpoint.to_hugging_face import write_hugging_face
from metaseq_api.core.config import ModelConfig
from metaseq_api.model.opt import OPT
from metaseq_api.parallel.context import ParallelContext

PIECE = 16 << 20
"""Units: bytes that a plain read asks for at a time."""
NUM_SHARDS = 8
WAYS = ("plain", "read", "load")
LAYOUTS = {"shards": f"{NUM_SHARDS} raw FSDP shards", "parts": "2 unflattened parts", "hf": "Hugging Face, safetensors"}
Key = tuple[str, int, str, str]
"""Layout, number of ranks, "cold" or "warm", way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One run. Units: bytes of the files; seconds from the word to the last rank's end, imports left out."""

    num_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.seconds / 1e9


def make(
    folder: Path, config: ModelConfig, layouts: Sequence[str], say: Callable[[str], object]
) -> dict[str, list[Path]]:
    """Write these layouts below a folder, weights alone; kept where they are there. Raises: ResourceError.

    The shards are made in any case, since the others are made of them.
    """
    folders = {layout: folder / layout for layout in LAYOUTS if layout in (*layouts, "shards")}
    check_room(folder, 0)
    missing = [f for f in folders.values() if not f.is_dir()]
    if len(list((folder / "shards").glob("*.pt"))) < NUM_SHARDS:
        missing = list(folders.values())
    whole_too = folder / "parts" in missing  # which are cut of one file
    check_room(folder, 2 * (len(missing) + whole_too) * config.num_params)
    make_shards(folder / "shards", config, NUM_SHARDS, say, moments=False)
    if folder / "parts" in missing:
        say("making 2 parts")
        making, form = folder / "parts.making", Form(skip_optimizer_state=True)
        (whole,) = reshard_fsdp(sorted((folder / "shards").glob("*.pt")), str(making / "whole.pt"), form=form)
        reshard_mp([whole], str(making / "reshard-model_part-{i}.pt"), num_output_parts=2, form=form)
        whole.unlink()
        making.rename(folder / "parts")
    if folder / "hf" in missing:
        say("making a Hugging Face folder")
        write_hugging_face(open_checkpoint(folder / "shards"), folder / "hf.making")
        (folder / "hf.making").rename(folder / "hf")
    suffixes = (".pt", ".safetensors")
    found = {name: sorted(p for p in f.iterdir() if p.suffix in suffixes) for name, f in folders.items()}
    return {name: found[name] for name in layouts}


def measure(
    files: Mapping[str, Sequence[Path]], ranks: Sequence[int], rounds: int, dtype: str, say: Callable[[str], object]
) -> dict[Key, list[Figure]]:
    """Read every layout over so many ranks, cold and warm, in turns; what follows the reading is timed once."""
    figures: dict[Key, list[Figure]] = {}
    for layout, paths in files.items():
        for num in ranks:
            for turn in range(rounds):
                ways = ("plain", "read") if turn % 2 == 0 else ("read", "plain")
                for way in (*ways, "load") if turn == 0 else ways:
                    drop(paths)
                    figures.setdefault((layout, num, "cold", way), []).append(run(way, paths, num, dtype))
                for way in ways:  # all pages were read just now
                    figures.setdefault((layout, num, "warm", way), []).append(run(way, paths, num, dtype))
                say(f"{LAYOUTS[layout]} over {num} rank(s): round {turn + 1} of {rounds} done")
    return figures


def run(way: str, paths: Sequence[Path], num_ranks: int, dtype: str) -> Figure:
    """Read the files once, over so many processes that begin together."""
    code = "from metaseq_api.bench.load import child; child({!r}, {!r}, {}, {}, {!r})"
    lines = [code.format(way, list(map(str, paths)), rank, num_ranks, dtype) for rank in range(num_ranks)]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child_of(line)) for line in lines]
        for process in processes:
            assert process.stdout
            process.stdout.readline()  # it has imported everything
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return Figure(num_bytes=sum(path.stat().st_size for path in paths), seconds=max(map(float, said)))


def child(way: str, paths: Sequence[str], rank: int, num_ranks: int, dtype: str) -> None:
    """One rank in this process: say that it is ready, wait for the word, do it, say how long it took."""
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began = time.perf_counter()
    if way == "plain":
        kept: object = read_plain([Path(p) for p in paths], rank, num_ranks)
    else:
        device = torch.device("meta" if way == "read" else "cpu")
        checkpoint = open_checkpoint(Path(paths[0]).parent)
        context = ParallelContext(rank=rank, tensor_size=num_ranks, device=device)
        kept = OPT(checkpoint.config, context, DTYPES[dtype])
        kept.load(checkpoint)
    sys.stdout.write(f"{time.perf_counter() - began}\n")
    del kept


def read_plain(paths: Sequence[Path], rank: int, num_ranks: int) -> list[torch.Tensor]:
    """Read one rank's share of the files' bytes, in order, and keep it."""
    sizes = [path.stat().st_size for path in paths]
    start, stop = (sum(sizes) * r // num_ranks for r in (rank, rank + 1))
    kept, begin = [], 0
    for path, size in zip(paths, sizes, strict=True):
        at, end = max(start - begin, 0), min(stop - begin, size)
        begin += size
        if at >= end:
            continue
        with path.open("rb", buffering=0) as file:
            while at < end:
                piece = torch.empty(min(PIECE, end - at), dtype=torch.uint8)
                done = os.preadv(file.fileno(), [piece.numpy()], at)  # type: ignore[list-item]
                assert done, f"{path} became shorter"
                kept.append(piece[:done])
                at += done
    return kept


def cells(figures: Mapping[Key, Sequence[Figure]]) -> list[list[str]]:
    """A head, and a line for each layout, ranks and state: medians with the range; reads beside the plain one's."""
    lines = [["layout", "ranks", "pages", *(f"{way}, GB/s" for way in WAYS), "read/plain"]]
    for layout, num, state in dict.fromkeys(key[:3] for key in figures):
        line, middles = [LAYOUTS[layout], str(num), state], {}
        for other in WAYS:
            rates = [f.gb_per_s for f in figures.get((layout, num, state, other), ())]
            if rates:
                middles[other] = statistics.median(rates)
            line.append(f"{middles[other]:.2f} ({min(rates):.2f}-{max(rates):.2f})" if rates else "")
        lines.append([*line, f"{middles['read'] / middles['plain']:.2f}"])
    return lines
