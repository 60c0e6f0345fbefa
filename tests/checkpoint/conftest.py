"""What several tests of this folder read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import clean_env

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 120


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under FSDP2 left."""
    folder = tmp_path_factory.mktemp("fsdp2")
    env = clean_env(PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1")
    argv = [[sys.executable, str(TESTS / "support" / "fsdp2_rank.py"), str(folder), str(r), "2"] for r in range(2)]
    ranks = [subprocess.Popen(a, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for a in argv]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    return folder
