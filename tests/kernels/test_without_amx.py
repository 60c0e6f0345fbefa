"""A CPU with AVX-512 and without AMX computes in fp32 by the same kernels: compiled for such a one, in a process
that does not ask the system for tiles, which ends one that uses them. Such a machine itself is not at hand, and that
nothing else of it is used (AVX512_BF16) is not shown here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.own_kernels import needs_vectors

from metaseq_api.machine import has_amx, has_avx512

PROGRAM = """
import torch
from metaseq_api.kernels import compiling, native as module

compiling.FLAGS = tuple("-march=skylake-avx512" if f == "-march=native" else f for f in compiling.FLAGS)
module.has_amx = lambda: False
cpu = torch.device("cpu")
own = module.native_for(torch.float32, cpu)
assert own is not None and not own.multiplies_tiles
assert module.native_for(torch.bfloat16, cpu) is None

from support.hf_opt import VARIANTS, config_of, logits, metaseq_weights, tiny_opt
from support.steps import Driver
from metaseq_api.model.weights import TensorWeights

for dtype, atol in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):  # the latter by torch, which does ask for tiles
    for variant in VARIANTS:
        hf = tiny_opt(variant)
        ours = Driver(config_of(hf), TensorWeights(metaseq_weights(hf)), dtype=dtype)
        used = ours.model.layers[0].fc1.native
        assert used is (own if dtype == torch.float32 else None), (variant, dtype)
        prompt = list(range(5, 45))
        rows, done = [], 0
        for end in (37, 38, 39, 40):  # a prompt, then tokens one by one
            rows.extend(ours.step((prompt[:end], done, list(range(3, 9)))))
            done = end
        torch.testing.assert_close(torch.cat(rows).float(), logits(hf, prompt), atol=atol, rtol=0)
print("all of", len(VARIANTS))
"""


def test_processors_say_what_they_can_do(tmp_path: Path) -> None:
    about = tmp_path / "cpuinfo"
    wide = "fpu avx512f avx512bw avx512dq avx512vl"
    for flags, vectors, tiles in (
        (None, False, False),
        ("", False, False),
        ("fpu avx512f", False, False),
        (wide, True, False),
        (f"{wide} avx512_bf16", True, False),
        (f"{wide} avx512_bf16 amx_bf16 amx_tile", True, True),
        ("fpu avx512_bf16 amx_bf16 amx_tile", False, False),
    ):
        if flags is not None:
            about.write_text(f"processor\t: 0\nflags\t\t: {flags}\n" if flags else "Features\t: fp asimd\n")
        assert (has_avx512(about), has_amx(about)) == (vectors, tiles), flags


@needs_vectors
def test_fp32_needs_no_tiles(tmp_path: Path) -> None:
    env = dict(os.environ, HOME=str(tmp_path), PYTHONPATH=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all of")
