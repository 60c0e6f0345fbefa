"""LLM over two ranks: this process and one more, over gloo. The same text, and nobody left behind."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from support.processes import TESTS, clean_env, gone, until

from metaseq_api import LLM, SamplingParams
from metaseq_api.errors import ParallelSizeError, RankFailed, SettingsError
from metaseq_api.resident import Resident
from metaseq_api.settings import given

GREEDY = SamplingParams(max_tokens=24, temperature=0)
PROMPTS = ["Return the", "Raise ValueError if"]


def ranks(pid: int | None = None) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children() if "metaseq_api.launch.child" in p.cmdline()]


def test_two_ranks_say_and_score_what_one_does_and_are_gone_when_closed() -> None:
    with LLM() as llm:
        want, scores = [g.text for g in llm.generate(PROMPTS, GREEDY)], llm.score(PROMPTS)
    with LLM(model_parallel=2) as llm:
        others = ranks()
        assert len(others) == 1
        assert [g.text for g in llm.generate(PROMPTS, GREEDY)] == want
        assert "".join(llm.stream(PROMPTS[0], GREEDY)) == want[0]
        for found, expected in zip(llm.score(PROMPTS), scores, strict=True):
            assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)
        with pytest.raises(SettingsError, match="close that first"):
            LLM(model_parallel=2)
    assert not ranks()
    assert all(gone(p.pid) for p in others)
    assert not dist.is_initialized()


def test_a_killed_rank_is_named_and_another_model_can_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with LLM(model_parallel=2) as llm:
        ranks()[0].kill()
        for _ in range(2):
            with pytest.raises(RankFailed, match=r"rank 1 of 2 .* SIGKILL"):
                llm.generate("x")
    with LLM(model_parallel=2) as llm:
        assert llm.generate("Return the", GREEDY)[0].text.startswith(" string")
    assert not ranks()


def test_a_rank_that_cannot_start_is_told_in_its_own_words_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    with pytest.raises(RankFailed, match=r"not my day.*rank 1 of 2"):
        Resident(given({"model_parallel": 2}), module="support.unwilling_host")
    assert not ranks()
    assert not dist.is_initialized()


def test_a_size_that_does_not_divide_is_refused_before_any_process_starts() -> None:
    with pytest.raises(ParallelSizeError, match="3"):
        LLM(model_parallel=3)


@contextmanager
def program(what: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A user's program that has said it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-m", "support.notebook", what],
        cwd=folder,
        env=clean_env(OMP_NUM_THREADS="1", PYTHONPATH=str(TESTS)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with started:
        assert started.stdout
        try:
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


def test_a_program_that_ends_without_closing_ends_cleanly(tmp_path: Path) -> None:
    with program("forget", tmp_path) as started:
        _, said = started.communicate(timeout=60)
        assert (started.returncode, said) == (0, "")


def test_no_rank_outlives_a_killed_program(tmp_path: Path) -> None:
    with program("wait", tmp_path) as started:
        (other,) = ranks(started.pid)
        started.send_signal(signal.SIGKILL)
        until(lambda: gone(other.pid), "the rank to be gone", 10)


def test_ctrl_c_gives_up_what_was_asked_and_leaves_the_model_ready(tmp_path: Path) -> None:
    with program("interrupted", tmp_path) as started:
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
        assert (started.returncode, out.split("\n")[:2], err) == (0, ["interrupted", "0 0"], "")
