"""The kernels of our own on a CPU, for tests that want them: most machines have none."""

from __future__ import annotations

import shutil

import pytest

from metaseq_api.kernels.compiling import COMPILERS
from metaseq_api.kernels.native import Native, native
from metaseq_api.machine import has_amx

can_have = has_amx() and any(map(shutil.which, COMPILERS))
"""Where they then do not compile, tests fail and are not skipped."""
needs_own = pytest.mark.skipif(not can_have, reason="this machine has no AMX, or no C compiler")


def own() -> Native:
    """Where `needs_own` lets a test run."""
    found = native()
    assert found is not None, "the kernels do not compile, or the system gives no AMX; the log says which"
    return found
