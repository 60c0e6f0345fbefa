"""The Triton kernels compile for a Hopper GPU: types hold, nothing spills, and memory is read 16 bytes at a time.

A CPU's kernels compile without an optimiser, for compilers do not optimise alike.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.own_kernels import needs_own

from metaseq_api.kernels import have_triton
from metaseq_api.kernels.compiling import SOURCES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not have_triton(), reason="triton is not installed; torch's CUDA builds bring it")
def test_kernels_compile_for_a_hopper_gpu_without_spilling_and_with_wide_loads(tmp_path: Path) -> None:
    # a process of its own: in this one Triton may be set to interpret
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "support" / "compile_kernels.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 24
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["reg"] <= 168, kernel
        assert kernel["wide"], kernel
        assert kernel["waits"] == kernel["early"], kernel  # for the kernel before, once
        assert bool(kernel["before"]) == (kernel["early"] and "INPUTS" in kernel["name"]), kernel  # weights alone


@needs_own
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_cpus_kernels_compile_without_an_optimiser(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    for source in sorted(SOURCES.glob("*.c")):
        command = [compiler, "-O0", "-march=native", "-fPIC", "-c", str(source), "-o", str(tmp_path / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
