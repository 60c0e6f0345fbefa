"""A rank that may come late: python late_rank.py RANK STORE SECONDS."""

from __future__ import annotations

import os
import sys
import threading

import torch

from metaseq_api.parallel.context import join, leave

if __name__ == "__main__":
    rank, store, late_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    threading.Event().wait(late_s)
    context = join(rank=rank, world_size=2, init=f"file://{store}", device=torch.device("cpu"), timeout_s=1.5)
    assert context.least(rank) == 0
    context.wait_for_all("done", timeout_s=60)
    leave(context)
    sys.stdout.flush()
    os._exit(0)  # as a service's ranks end: a library's teardown may abort
