"""One command for a machine with a GPU: parity with Hugging Face, then a table of speeds, in under ten minutes.

    PYTHONPATH=. python3 -m metaseq_api.bench.gpu_check --json gpu.json

It runs from a checkout on the machine's own Python: torch, numpy, tokenizers, transformers, and triton where there is a
GPU. Each section is a process with a time of its own; what is over it is ended, and said so. The exit code is
1 where parity fails or its section does not end, else 0. `--device cpu --quick` runs the same code on tiny shapes: it
proves that the command works, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metaseq_api.bench import gpu_parity, gpu_speed
from metaseq_api.core import ModelConfig
from metaseq_api.core.config import OPT_SHAPES

QUICK = ModelConfig(num_layers=1, hidden_dim=64, num_heads=2, ffn_dim=128, vocab_size=4096, max_positions=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the check. limit_s: seconds, after which it is ended. decides: whether the exit code hangs on it."""

    name: str
    limit_s: float
    decides: bool = False


SECTIONS = (
    Section(name="kernels", limit_s=90, decides=True),
    Section(name="parity tiny", limit_s=150, decides=True),
    Section(name="parity opt-125m", limit_s=60, decides=True),
    Section(name="parity opt-1.3b", limit_s=60, decides=True),
    Section(name="greedy opt-125m", limit_s=60, decides=True),
    Section(name="latency opt-1.3b", limit_s=45),
    Section(name="latency opt-6.7b", limit_s=45),
    Section(name="latency opt-13b", limit_s=50),
    Section(name="latency opt-30b", limit_s=70),
    Section(name="early starts", limit_s=60),
    Section(name="throughput opt-13b", limit_s=70),
    Section(name="tune", limit_s=60),
    Section(name="rival opt-13b", limit_s=170),
)
QUICK_SECTIONS = (
    Section(name="parity tiny", limit_s=60, decides=True),
    Section(name="greedy tiny", limit_s=30, decides=True),
    Section(name="latency tiny", limit_s=30),
    Section(name="throughput tiny", limit_s=30),
    Section(name="rival tiny", limit_s=30),
)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print what they found, write it as JSON; 1 where parity fails."""
    args = _parser().parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.section:
        for line in run_section(args.section, device):
            say(json.dumps(line))
        return 0
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: no figure of a GPU"
    say(f"{machine}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    began, passed, found = time.monotonic(), True, []
    for section in QUICK_SECTIONS if args.quick else SECTIONS:
        if args.only and not section.name.startswith(tuple(args.only)):
            continue
        left = args.limit - (time.monotonic() - began)
        lines, ended, errors = _child(section, device, limit_s=min(section.limit_s, left))
        sound = not ended and all(line.get("passed", True) for line in lines)
        passed &= sound or not section.decides
        found.append({"section": section.name, "ended": ended, "errors": errors, "lines": lines})
        _show(section, lines, ended)
        if args.json:  # after each, since the next may take all the time that is left
            report = {"machine": machine, "torch": torch.__version__, "sections": found}
            args.json.write_text(json.dumps(report, indent=1))
    say(f"\n{'parity holds' if passed else 'PARITY FAILS'}, {time.monotonic() - began:.0f} s")
    return 0 if passed else 1


def run_section(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """What a section finds, line by line: checks with `passed`, figures with `value` and `unit`."""
    kind, _, shape = name.partition(" ")
    quick = shape == "tiny"
    config, dtype = QUICK if shape in ("", "tiny") else OPT_SHAPES[shape], torch.bfloat16
    many = {"num": 4, "prompt_len": 16, "new": 8} if quick else {"num": 256, "prompt_len": 128, "new": 256}
    checks = {
        "parity": lambda: gpu_parity.parity(device, shape),
        "kernels": lambda: gpu_parity.kernels(device),
        "early": lambda: gpu_parity.early(device),
    }
    if kind in checks:
        for check in checks[kind]():
            yield asdict(check) | {"passed": check.passed}
        return
    if kind == "greedy":
        same, asked = gpu_speed.greedy(config, device)
        bound = {"error": asked - same, "bound": 0, "passed": same == asked}
        yield {"what": f"greedy tokens of the engine that Hugging Face did not choose, fp32, of {asked}"} | bound
        return
    figures = {
        "latency": lambda: gpu_speed.latency(config, device, dtype, quick=quick),
        "throughput": lambda: gpu_speed.throughput(config, device, dtype, **many),
        "rival": lambda: gpu_speed.rival(config, device, dtype, **many, static=not quick),
        "tune": lambda: gpu_speed.tune(device),
    }[kind]()
    for what, value, unit in figures:
        yield {"what": what, "value": value, "unit": unit}


def _child(section: Section, device: torch.device, *, limit_s: float) -> tuple[list[dict[str, Any]], str, str]:
    """A section in a process of its own: what it found, how it ended where that was not by itself, and what it said."""
    if limit_s <= 0:
        return [], "skipped: the whole check's time is over", ""
    command = [sys.executable, "-m", "metaseq_api.bench.gpu_check", "--section", section.name, "--device", str(device)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=limit_s, check=False).returncode
            ended = "" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            ended = f"ended: it took more than {limit_s:.0f} s"
        out.seek(0)
        err.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        errors = err.read()[-4000:].strip()
    return lines, f"{ended} ({errors.splitlines()[-1].strip()})" if ended and errors else ended, errors


def _show(section: Section, lines: list[dict[str, Any]], ended: str) -> None:
    say(f"\n{section.name}")
    checks = [line for line in lines if "passed" in line]
    worst = max(checks, key=lambda c: c["error"] / max(c["bound"], 1e-30), default=None)
    if worst is not None:
        good = sum(c["passed"] for c in checks)
        say(f"  {good} of {len(checks)} comparisons hold; nearest to its bound: {_told(worst)}")
    for line in lines:
        if not line.get("passed", True):
            say(f"  FAILS: {_told(line)}")
        elif "value" in line:
            say(f"  {line['what']:<62} {line['value']:10.3f} {line['unit']}")
    if ended:
        say(f"  {ended}")


def _told(check: dict[str, Any]) -> str:
    return f"{check['what']}: {check['error']:.2e} of {check['bound']:.2e}, {check.get('strays', 0)} strays"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Parity and speed on a GPU.")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that the command works")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections whose names begin so")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for all sections (default: 570)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found here")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
