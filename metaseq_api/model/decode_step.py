"""A step in which every sequence feeds one token, with inputs that always lie in the same memory: on a GPU it is
captured once for each batch size of a ladder, and then replayed as one CUDA graph.

A Batch is put into the next larger size; rows that pad it have a context of no tokens, touch no cache, and are cut off.
The same planning, buffers and forward pass run without a capture on a CPU.

Where the model is split, each rank captures its own part, sums between ranks included, and the logits are gathered
after the replay: all ranks make the same sizes in the same order.

Knows the model and the plan. Does not know scheduling or sampling.

Shapes: B rows of one size of the ladder, N blocks of the longest table, V vocabulary, Vn this rank's share of it.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.kernels.reference import Kernels
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT
from metaseq_api.model.paged import PagedPlan, Singles, tables
from metaseq_api.parallel.transfer import put_into

log = logging.getLogger(__name__)

LARGEST = 256
"""The most sequences that one graph decodes; a larger step runs without one."""
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and libraries take their workspaces then."""


def ladder(largest: int) -> list[int]:
    """The batch sizes that are captured: powers of two, the last as large as `largest` needs or LARGEST."""
    sizes = [1]
    while sizes[-1] < min(largest, LARGEST):
        sizes.append(2 * sizes[-1])
    return sizes


def known(token_ids_T: Tensor, drawn: Tensor) -> Tensor:
    """Tokens to be fed, those below 0 (-1 - row) taken from what the step before drew."""
    return torch.where(token_ids_T < 0, drawn[(-1 - token_ids_T).clamp(min=0)].to(token_ids_T.dtype), token_ids_T)


class DecodeStep:
    """One size: its input buffer, the plan that points into it, and what replays it."""

    def __init__(self, model: OPT, cache: KVCache, kernels: Kernels, size: int, drawn: Tensor | None = None) -> None:
        self.model, self.cache, self.size, self._drawn = model, cache, size, drawn
        self.width = -(-model.config.max_positions // cache.block_size)
        device = model.context.device
        self._inputs = torch.zeros(size * (3 + self.width), dtype=torch.int32, device=device)
        tokens, positions, contexts, blocks = torch.split(self._inputs, [size, size, size, size * self.width])
        rows = torch.arange(size, dtype=torch.int32, device=device)
        singles = Singles(rows_B=rows, contexts_B=contexts, tables_BN=blocks.view(size, self.width))
        self.plan = PagedPlan(
            kernels=kernels, token_ids_T=tokens, positions_T=positions, logit_rows=rows, singles=singles
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._own_logits_BVn: Tensor

    def _forward(self) -> Tensor:
        if self._drawn is not None:
            self.plan.token_ids_T.copy_(known(self.plan.token_ids_T, self._drawn))
        own: Tensor = self.model.embed.own_logits(self.model(self.plan, self.cache))
        return own

    @torch.inference_mode()
    def capture(self, pool: object, stream: torch.cuda.Stream) -> None:
        """Record the step on the GPU; graphs of one `pool` share their memory, and only one may run at a time.

        stream: where it is run before; cuBLAS keeps room for each that it ever saw.
        """
        self._inputs.zero_()  # no sequence has any tokens: the runs below touch no cache
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **how):  # type: ignore[arg-type]
            self._own_logits_BVn = self._forward()
        self._graph = graph

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor | None:
        """The items' logits, valid until the next run.

        Shapes: -> [len(batch.items), V] fp32 on the driver; None on the other ranks.
        """
        put_into(self._inputs, self._words(batch))
        if self._graph is None:
            self._own_logits_BVn = self._forward()
        else:
            self._graph.replay()
        logits: Tensor | None = self.model.embed.joined(self._own_logits_BVn[: len(batch.items)])
        return logits

    def _words(self, batch: Batch) -> np.ndarray:
        words = np.zeros(len(self._inputs), np.int32)
        num, size = len(batch.items), self.size
        words[:num] = [i.token_ids[0] for i in batch.items]
        words[size : size + num] = [i.start for i in batch.items]
        words[2 * size : 2 * size + num] = [i.context_len for i in batch.items]
        rest = words[3 * size :].reshape(size, self.width)
        rest[:num] = tables(list(batch.items), self.width)
        return words


class DecodeSteps:
    """The ladder of sizes over one model and cache, each made when it is first asked for; the largest should be first,
    for its memory serves all.

    drawn: where the tokens lie that the step before drew, if they need not be known here.
    """

    def __init__(
        self,
        model: OPT,
        cache: KVCache,
        kernels: Kernels,
        drawn: Tensor | None = None,
        *,
        capture: bool = True,
    ) -> None:
        self._model, self._cache, self._kernels = model, cache, kernels
        self._drawn = drawn
        self._steps: dict[int, DecodeStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(model.context.device) if capture else None  # type: ignore[no-untyped-call]

    def takes(self, batch: Batch) -> bool:
        """Whether every item of a Batch feeds one token and wants its logits."""
        return len(batch.items) <= LARGEST and all(i.num_logits == len(i.token_ids) == 1 for i in batch.items)

    def run(self, batch: Batch) -> Tensor | None:
        """As DecodeStep.run."""
        return self.step(ladder(len(batch.items))[-1]).run(batch)

    def step(self, size: int) -> DecodeStep:
        """That size, made if it was not yet."""
        step = self._steps.get(size)
        if step is None:
            began = time.monotonic()
            step = DecodeStep(self._model, self._cache, self._kernels, size, self._drawn)
            if self._stream is not None:
                step.capture(self._pool, self._stream)
            self._steps[size] = step
            log.info("decode step of %d sequences prepared in %.1f s", size, time.monotonic() - began)
        return step
