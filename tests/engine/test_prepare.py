"""Decode steps that are made while requests are answered: when, in which order, and on every rank alike.

A GPU captures them as CUDA graphs; here they are the same steps, uncaptured, with plain torch's attention.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import rank_prepares
from support.engines import ask, running_engine, tiny_model
from support.hf_opt import config_of, metaseq_weights
from support.processes import TESTS, clean_env, until
from support.uncaptured import made
from torch import Tensor

from metaseq_api.core import Batch
from metaseq_api.engine.worker import Worker

GREEDY = {"temperature": 0, "ignore_eos": True}


def test_the_largest_is_made_before_requests_come_and_the_others_while_none_do(tmp_path: Path) -> None:
    with running_engine(tmp_path, max_batch_size=8, prepares=True) as engine:
        assert made(engine._worker)[0] == 8
        until(lambda: not engine._worker.unprepared, "all to be made")
        assert made(engine._worker) == [8, 1, 2, 4]
        assert ask(engine, [5, 6, 7], max_tokens=3, **GREEDY)[0].num_tokens == 3
        assert made(engine._worker) == [8, 1, 2, 4]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_wants_one_is_answered_without_it_and_has_it_made_next(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain := tmp_path / "plain").mkdir()
    with running_engine(plain, ahead=ahead) as engine:
        want = [c.token_ids for c in ask(engine, *rank_prepares.PROMPTS, max_tokens=6, **GREEDY)]
    monkeypatch.setattr(Worker, "unprepared", False)  # as if it were never idle
    with running_engine(tmp_path, ahead=ahead, max_batch_size=32, prepares=True) as engine:
        worker, before = engine._worker, []
        run = worker.run

        def watched(batch: Batch) -> Iterator[Tensor | None]:
            before.append((len(batch.items), made(worker)))
            return run(batch)

        monkeypatch.setattr(worker, "run", watched)
        assert [c.token_ids for c in ask(engine, *rank_prepares.PROMPTS, max_tokens=6, **GREEDY)] == want
        assert before == [(3, [32]), (3, [32]), *[(3, [32, 4])] * 4]  # prompts; without it; with it
        assert made(worker) == [32, 4]
        monkeypatch.undo()
        ask(engine, [5], max_tokens=1, **GREEDY)  # or it waits for a heartbeat's time
        until(lambda: not worker.unprepared, "the others")
        assert sorted(made(worker)) == [1, 2, 4, 8, 16, 32]


def test_every_rank_makes_the_same_ones_in_the_same_order(tmp_path: Path) -> None:
    hf = tiny_model()
    torch.save((dataclasses.asdict(config_of(hf)), metaseq_weights(hf)), tmp_path / "model.pt")
    command = [sys.executable, str(TESTS / "support" / "rank_prepares.py")]
    env = clean_env(PYTHONPATH=f"{TESTS}:{TESTS.parent}")
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "store"), str(tmp_path)], env=env) for r in (0, 1)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"made-{r}.json").read_text()) for r in (0, 1))
    assert first == second == [8, 4, 1, 2]
    with running_engine(tmp_path) as engine:
        want = [list(c.token_ids) for c in ask(engine, *rank_prepares.PROMPTS, max_tokens=6, **GREEDY)]
    assert json.loads((tmp_path / "answers.json").read_text()) == want
