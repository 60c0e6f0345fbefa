"""One of those that `rivals` compares: loaded once by its adapter of the harness, it works whenever its turn comes.

    <its own Python> contender.py PEER DTYPE MODEL THREADS

It is copied into the harness and runs where nothing but that and the rival is installed: the standard library serves.
It says a line of JSON when it is ready; and for each line it reads, METRIC and TURN, how many tokens a second that was.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

PROMPT, LONG, MANY, NEW = 128, 1024, 32, 64
"""Tokens of a prompt, and of a long one; prompts at once; tokens of an answer."""


class Contender:
    """Prompts are the harness's, other ones each turn."""

    def __init__(self, adapter: Any, workload: Any) -> None:
        self._adapter, self._workload = adapter, workload

    def ready(self) -> dict[str, Any]:
        """Warm up; what it is, and the first tokens that it chooses."""
        self._timed([self._workload.prompt(PROMPT, "warm")], 16)
        self._timed([self._workload.prompt(LONG, "warm")], 1)
        self._timed([p[:64] for p in self._workload.batch(MANY, rep="warm")], 8)
        (first,) = self._adapter.generate([self._workload.prompt(64, "check")], 8)
        return {"info": self._adapter.info(), "first": [int(t) for t in first]}

    def work(self, metric: str, turn: str) -> float:
        """Units: tokens/s."""
        prompt = self._workload.prompt
        if metric == "prefill":
            return LONG / self._timed([prompt(LONG, f"long {turn}")], 1)
        if metric == "batch":
            return MANY * NEW / self._timed(self._workload.batch(MANY, rep=turn), NEW)
        assert metric == "decode", metric
        first_s = self._timed([prompt(PROMPT, f"first {turn}")], 1)
        return (NEW - 1) / (self._timed([prompt(PROMPT, f"decode {turn}")], NEW) - first_s)

    def _timed(self, prompts: list[list[int]], num: int) -> float:
        began = time.perf_counter()
        answers = self._adapter.generate(prompts, num)
        spent = time.perf_counter() - began
        if [len(a) for a in answers] != [num] * len(prompts):
            raise RuntimeError(f"wanted {num} tokens after each of {len(prompts)} prompts")
        return spent


def main(peer: str, dtype: str, model: str, threads: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints

    def say(told: object) -> None:
        print(json.dumps(told), file=out, flush=True)

    sys.excepthook = _fail
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    adapter = importlib.import_module(f"adapters.{peer}").Adapter(model, dtype, int(threads), {})
    contender = Contender(adapter, importlib.import_module("workload"))
    say(contender.ready())
    for line in sys.stdin:
        say(contender.work(*line.split()))
    if hasattr(adapter, "close"):
        adapter.close()
    os._exit(0)  # no library's thread may hold it


def _fail(*raised: Any) -> None:
    traceback.print_exception(*raised)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
