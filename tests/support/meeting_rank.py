"""One of two ranks that meet as a srun step's do, and say the least of their numbers: meeting_rank INIT RANK NUMBER."""

from __future__ import annotations

import os
import sys

import torch

from metaseq_api.launch.meeting import resolved
from metaseq_api.parallel.context import join, leave

if __name__ == "__main__":
    rank = int(sys.argv[2])
    with resolved(sys.argv[1], rank, None) as (init, listen_fd):
        cpu = torch.device("cpu")
        context = join(rank=rank, world_size=2, init=init, device=cpu, timeout_s=60, listen_fd=listen_fd)
    print(context.least(int(sys.argv[3])))
    context.wait_for_all("done", timeout_s=60)
    if rank == 0:
        sys.stdin.read()  # whoever started both closes it once the other has left: the store ends with this process
    leave(context)
    sys.stdout.flush()
    os._exit(0)  # as a service's ranks end: a library's teardown may abort
