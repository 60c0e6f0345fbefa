"""How fast FSDP shards are joined, and in how much memory: our way, `cp` of the same bytes, and loading everything.

Makes the shards of one part of any published shape, optimizer state in them, without fairscale. Each way runs in a
process of its own, whose anonymous memory is watched, and reads from the disk: the pages of what it reads are dropped
from the cache before. Does not print.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaseq_api.bench.children import child_of
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.flat import Unit, slice_len, units_of, write_units
from metaseq_api.checkpoint.reshard import reshard_fsdp
from metaseq_api.core.config import ModelConfig, tensor_shapes
from metaseq_api.errors import ResourceError

WAYS = ("ours", "cp", "load all")
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One run. Units: bytes written; seconds, imports left out; bytes above what the idle process had."""

    way: str
    num_bytes: int
    seconds: float
    peak_anon: int

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.seconds / 1e9


def make_shards(
    folder: Path, config: ModelConfig, num_shards: int, tell: Callable[[str], object], *, moments: bool = True
) -> list[Path]:
    """Write `checkpoint_last-model_part-0-shardK.pt` with fp16 weights and fp32 moments; kept where they are there."""
    check_room(folder, 0)
    units = units_of(stored_shapes(config))
    paths = [folder / f"checkpoint_last-model_part-0-shard{k}.pt" for k in range(num_shards)]
    for shard, path in enumerate(paths):
        if not path.exists():
            tell(f"making {path.name}")
            state = _shard(units, config, shard, num_shards, moments)
            torch.save(state, path.with_suffix(".making"))
            path.with_suffix(".making").rename(path)
    return paths


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """A whole model's parameters under metaseq's fused names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        if ".q_proj." in name:
            shapes[name.replace(".q_proj.", ".qkv_proj.")] = (3 * shape[0], *shape[1:])
        elif ".k_proj." not in name and ".v_proj." not in name:
            shapes[name] = shape
    return shapes


def _shard(units: Sequence[Unit], config: ModelConfig, shard: int, num_shards: int, moments: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(shard)
    lengths = [slice_len(u.numel, num_shards) for u in units]

    def numbers(length: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.rand(length, generator=generator).to(dtype)

    model = Namespace(
        decoder_layers=config.num_layers,
        decoder_attention_heads=config.num_heads,
        share_decoder_input_output_embed=True,
        activation_fn=config.activation,
    )
    return {
        "cfg": {"model": model},
        "model": {u.key: numbers(n, torch.float16) for u, n in zip(units, lengths, strict=True)}
        | {"decoder.version": torch.tensor([3.0])},
        "optimizer_history": [{"num_updates": 1000}],
        "extra_state": {},
        "last_optimizer_state": {
            "state": {
                i: {"step": 1000, "exp_avg": numbers(n, torch.float32), "exp_avg_sq": numbers(n, torch.float32)}
                for i, n in enumerate(lengths if moments else ())
            },
            "param_groups": [],
        },
        "shard_metadata": write_units(units, shard, num_shards, ["decoder.version"]),
    }


def drop(paths: Sequence[Path]) -> None:
    """Take the files' pages out of the page cache; those not yet on the disk are written first."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def run(way: str, shards: Sequence[Path], folder: Path) -> Figure:
    """Join the shards' weights once. `cp` copies what our way wrote before it, and syncs it as our way does."""
    output, before = folder / f"{way.replace(' ', '-')}.pt", folder / "ours.pt"
    code = f"from metaseq_api.bench.reshard import child; child({way!r}, {list(map(str, shards))!r}, {str(output)!r})"
    with child_of(code) as process:
        to, back = process.stdin, process.stdout
        assert to
        assert back
        back.readline()  # it has imported everything
        drop([before] if way == "cp" else shards)
        idle = peak = _anon(process.pid)
        to.write("go\n")
        to.flush()
        while process.poll() is None:
            peak = max(peak, _anon(process.pid))
            time.sleep(_POLL_S)
        seconds = float(back.readline())
    assert process.returncode == 0
    figure = Figure(way=way, num_bytes=output.stat().st_size, seconds=seconds, peak_anon=peak - idle)
    if output != before:
        output.unlink()
    return figure


def child(way: str, shards: Sequence[str], output: str) -> None:
    """One way in this process: say that it is ready, wait for the word, do it, say how long it took."""
    done = {"ours": _ours, "cp": _cp, "load all": _load_all}[way]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began = time.perf_counter()
    done([Path(s) for s in shards], Path(output))
    sys.stdout.write(f"{time.perf_counter() - began}\n")


def _ours(shards: Sequence[Path], output: Path) -> None:
    output.unlink(missing_ok=True)
    form = Form(unflatten=True, skip_optimizer_state=True, dtype=None, drop_metaseq_req=False)
    reshard_fsdp(shards, str(output), form=form)


def _cp(shards: Sequence[Path], output: Path) -> None:
    subprocess.run(["cp", output.with_name("ours.pt"), output], check=True)
    subprocess.run(["sync", output], check=True)


def _load_all(shards: Sequence[Path], output: Path) -> None:
    """As metaseq's reshard_fsdp does it: every file whole in memory, join, take apart, save."""
    with torch.serialization.safe_globals([Namespace]):
        files: list[Mapping[str, Any]] = [torch.load(s, weights_only=True) for s in shards]
    weights: dict[str, torch.Tensor] = {}
    for at, entry in enumerate(files[0]["shard_metadata"]["param_metadata"]):
        ((flat, said),) = entry["params"].items()
        path = f"{entry['fsdp_path']}." if entry["fsdp_path"] else ""
        slices = []
        for file in files:
            ((_, own),) = file["shard_metadata"]["param_metadata"][at]["params"].items()
            numbers = file["model"][path + flat]
            slices.append(numbers[: numbers.numel() - own["padding"]])
        joined = torch.split(torch.cat(slices), said["numels"])
        weights |= {path + n: t.view(s) for n, t, s in zip(said["names"], joined, said["shapes"], strict=True)}
    torch.save({**files[0], "model": weights, "last_optimizer_state": None}, output)
    subprocess.run(["sync", output], check=True)


def _anon(pid: int) -> int:
    """Anonymous memory of a process in bytes: what the kernel cannot give up. Source: /proc/PID/status, RssAnon."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def check_room(folder: Path, needed: int) -> None:
    """Make the folder. Raises: ResourceError where it cannot be, or fewer bytes are free than the files take."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if (free := room(there)) < needed:
        raise ResourceError(
            f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed: "
            "name another --folder or a smaller --shape"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"--folder {folder} cannot be made ({error.strerror}); name another") from None


def room(folder: Path) -> int:
    """Bytes free where the shards go."""
    return shutil.disk_usage(folder).free


def measure(
    folder: Path, config: ModelConfig, num_shards: int, rounds: int, say: Callable[[str], object]
) -> dict[str, list[Figure]]:
    """Make the shards and join them every way, in turns. Raises: ResourceError."""
    check_room(folder, 0)
    if not any(folder.glob("*shard*.pt")):
        check_room(folder, 17 * config.num_params)
    shards = make_shards(folder, config, num_shards, say)
    figures: dict[str, list[Figure]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in WAYS:
            figures[way].append(run(way, shards, folder))
        say(f"round {turn + 1} of {rounds} done")
    return figures


def cells(figures: Mapping[str, Sequence[Figure]]) -> list[list[str]]:
    """A head, and a line for each way: medians with the range, beside cp's."""
    base = statistics.median(f.gb_per_s for f in figures["cp"])
    lines = [["way", "GB/s written", "of cp", "peak anonymous memory, MB"]]
    for way, runs in figures.items():
        rates = [f.gb_per_s for f in runs]
        middle = statistics.median(rates)
        peak = max(f.peak_anon for f in runs) / 1e6
        lines.append([way, f"{middle:.2f} ({min(rates):.2f}-{max(rates):.2f})", f"{middle / base:.2f}", f"{peak:.0f}"])
    return lines
