"""The kernels of our own on a CPU, for tests that want them: most machines have none."""

from __future__ import annotations

import shutil

import pytest

from metaseq_api.kernels.compiling import COMPILERS
from metaseq_api.kernels.native import Native, native
from metaseq_api.machine import has_amx, has_avx512

_compiler = any(map(shutil.which, COMPILERS))
can_have = has_amx() and _compiler
"""Where they then do not compile, tests fail and are not skipped."""
needs_own = pytest.mark.skipif(not can_have, reason="this machine has no AMX, or no C compiler")
needs_vectors = pytest.mark.skipif(not (has_avx512() and _compiler), reason="no AVX-512, or no C compiler")
"""For those in fp32."""


def own() -> Native:
    """Where `needs_own` lets a test run."""
    found = native()
    assert found is not None, "the kernels do not compile; the log says why"
    return found
