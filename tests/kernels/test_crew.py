"""Threads that share out a kernel's work: any number of them, any number of callers, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.own_kernels import needs_own, own
from torch import Tensor

pytestmark = needs_own
IN_A_CHILD = """
import os, signal, torch
from metaseq_api.kernels.native import native
own, x, w = native(), torch.randn(64, 256), torch.randn(4096, 256)
torch.set_num_threads(2)
packed = own.pack(w, w.dtype)
want = own.linear(x, packed, 4096, None)
child = os.fork()
if not child:
    signal.alarm(30)  # else a caller that waits for threads which a fork does not copy would wait for ever
    os._exit(0 if own.linear(x, packed, 4096, None).equal(want) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(seed: int, num_threads: int) -> Tensor:
    torch.set_num_threads(num_threads)
    given = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(100, 192, generator=given), torch.randn(1000, 192, generator=given)
    return own().linear(x, own().pack(weight, weight.dtype), 1000, None)


@pytest.mark.parametrize("num", [2, 3, 17])
def test_any_number_of_threads_gives_the_same_bits(num: int) -> None:
    for seed in range(20):
        assert product(seed, num).equal(product(seed, 1))


def test_several_callers_at_once_get_what_is_theirs() -> None:
    want = [product(seed, 1) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(30):
            got = list(pool.map(lambda seed: product(seed, 3), range(8)))
            assert all(g.equal(w) for g, w in zip(got, want, strict=True))


def test_a_forked_process_has_no_threads_and_does_the_work_itself() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "0", done.stderr


def test_torchs_threads_rest_where_ours_compute() -> None:
    code = "import os, metaseq_api; print(os.environ.get('GOMP_SPINCOUNT'))"
    waits = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {k: v for k, v in os.environ.items() if k not in waits}
    for given, want in (({}, "5000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "9"}, "9")):
        said = subprocess.check_output([sys.executable, "-c", code], env=clean | given, text=True)
        assert said.strip() == want


def test_what_torch_holds_lies_in_large_pages_unless_told_otherwise() -> None:
    code = "import os, metaseq_api; print(os.environ.get('THP_MEM_ALLOC_ENABLE'))"
    clean = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    there_are = Path("/sys/kernel/mm/transparent_hugepage").exists()
    for given, want in (({}, "1" if there_are else "None"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")):
        said = subprocess.check_output([sys.executable, "-c", code], env=clean | given, text=True)
        assert said.strip() == want
