"""What is shown of loading is true: every byte that a rank reads is counted, and the total was known before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from metaseq_api.scripts.to_hugging_face import main as to_hugging_face

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.counted import Counted, driver_bytes
from metaseq_api.model.opt import OPT
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.settings import DEMO


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hf")
    assert to_hugging_face(["--input", str(DEMO), "--output", str(folder)]) == 0
    return {"shards": DEMO, "hugging face": folder}


@pytest.mark.parametrize("kind", ["shards", "hugging face"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_driver_reads_as_many_bytes_as_were_announced(ranks: int, kind: str, folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders[kind])
    read: list[int] = []
    nowhere = ParallelContext(tensor_size=ranks, device=torch.device("meta"))
    OPT(checkpoint.config, nowhere, torch.float16).load(Counted(checkpoint, read.append))
    assert sum(read) == driver_bytes(checkpoint, ranks)
    assert len(read) == len(checkpoint.names())
    if ranks == 1:
        assert sum(read) == checkpoint.num_bytes
