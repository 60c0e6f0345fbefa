"""The kernels of our own on a CPU, for tests that want them: most machines have none."""

from __future__ import annotations

import pytest

from metaseq_api.kernels.native import Native, native

needs_own = pytest.mark.skipif(native() is None, reason="this machine has no AMX, or no C compiler")


def own() -> Native:
    """Where `needs_own` lets a test run."""
    found = native()
    assert found is not None
    return found
