"""Workers that take their decode steps as a GPU does, from buffers that are made once for each size, but uncaptured."""

from __future__ import annotations

from metaseq_api.engine.worker import Worker
from metaseq_api.kernels import reference
from metaseq_api.model.decode_step import DecodeSteps


def uncaptured(worker: Worker) -> Worker:
    """The same worker, which has made nothing yet. It attends by plain torch, and so must its plans."""
    worker._kernels = reference.PLAIN
    worker._decode = DecodeSteps(worker.model, worker.cache, worker._kernels, worker._drawn, capture=False)
    return worker


def made(worker: Worker) -> list[int]:
    """The sizes that it has made, in their order."""
    assert worker._decode is not None
    return list(worker._decode._steps)
