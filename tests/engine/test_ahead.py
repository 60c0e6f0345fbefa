"""A step that is started before the one before is answered: what is done when, and nothing else about an answer.

That answers are the same either way is shown where they are tested (test_engine, test_fields, test_stream). Here a CPU
takes its steps as a GPU would, which computes them one after another all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import ask, running_engine, slow_down
from support.processes import until
from torch import Tensor

from metaseq_api.core import Batch, Request, SamplingParams
from metaseq_api.engine.engine import Engine
from metaseq_api.errors import MetaseqApiError, RequestError


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with running_engine(tmp_path, ahead=True) as e:
        yield e


def request(*prompt: int, **params: object) -> Request:
    asked = SamplingParams(**{"ignore_eos": True, **params})  # type: ignore[arg-type]
    return Request(request_id="r", prompts=(prompt,), params=asked)


def watch(engine: Engine) -> list[str]:
    """What the engine does from now on, in its order; of a step, the last token of its first item."""
    done: list[str] = []
    run, add, draw = engine._worker.run, engine._words.add, engine._sampler.draw

    def watched(batch: Batch) -> Iterator[Tensor | None]:
        done.append(f"start {min(batch.items[0].token_ids[-1], 0)}")
        return run(batch)

    engine._worker.run = watched  # type: ignore[method-assign]
    engine._words.add = lambda tokens: (done.append("words"), add(tokens))[1]  # type: ignore[method-assign, func-returns-value]
    engine._sampler.draw = lambda logits, rows: (done.append("draw"), draw(logits, rows))[1]  # type: ignore[method-assign]
    return done


def test_a_step_is_started_before_the_words_of_the_one_before_and_drawn_after_them(engine: Engine) -> None:
    done = watch(engine)
    (got,) = ask(engine, [5, 6, 7], max_tokens=4, temperature=0, ignore_eos=True)
    assert got.num_tokens == 4
    until(lambda: done[-1] == "words", "the last words")
    # a token below 0 is a row of what was drawn and not read; no step follows the last token, which is known to be it
    assert done == ["start 0", "draw", *["start -1", "words", "draw"] * 3, "words"]


def test_a_sequence_that_its_words_end_is_started_once_more_for_nothing(engine: Engine) -> None:
    (text,) = (c.text for c in ask(engine, [5, 6, 7], max_tokens=8, temperature=0, ignore_eos=True))
    done = watch(engine)
    (got,) = ask(engine, [5, 6, 7], max_tokens=8, temperature=0, ignore_eos=True, stop=(text[:2],))
    assert got.text == ""
    until(lambda: done[-1] in ("words", "start -1"), "the last step")
    num_tokens = got.num_tokens
    until(lambda: engine.health().num_running == 0, "it to be forgotten")
    assert sum(what.startswith("start") for what in done) == num_tokens + 1
    assert done.count("draw") == num_tokens  # but nothing is drawn for it again
    assert engine.stats.generation_tokens == 8 + num_tokens


def test_one_that_is_cancelled_while_its_token_is_unread_leaves_the_others_alone(engine: Engine) -> None:
    slow_down(engine)
    want = ask(engine, [9, 8, 7], max_tokens=60, temperature=0, ignore_eos=True)
    for num in range(8):
        going = [engine.submit(request(5, 6, i, max_tokens=80, temperature=0)) for i in range(4)]
        other = engine.submit(request(9, 8, 7, max_tokens=60, temperature=0))
        until(lambda: engine.health().num_running == 5, "all to run")
        for ticket in going[: 1 + num % 4]:
            ticket.cancel()
            with pytest.raises(RequestError, match="went away"):
                ticket.result(30)
        assert other.result(30)[0].token_ids == want[0].token_ids
        for ticket in going:
            ticket.cancel()
        until(lambda: engine.health().num_running == 0, "all to end")


def test_an_error_of_a_step_reaches_those_whose_tokens_are_unread(tmp_path: Path) -> None:
    with running_engine(tmp_path, ahead=True, fails=True) as engine:
        slow_down(engine)
        ticket = engine.submit(request(5, 6, max_tokens=80, temperature=0))
        until(lambda: engine.stats.generation_tokens > 2, "some tokens")

        def fail(batch: Batch) -> Iterator[Tensor | None]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        engine._worker.run = fail  # type: ignore[method-assign]
        with pytest.raises(MetaseqApiError, match="the engine failed"):
            ticket.result(30)


def test_only_scored_prompts_end_though_nothing_is_drawn(engine: Engine) -> None:
    for _ in range(3):
        (got,) = ask(engine, list(range(5, 25)), max_tokens=0, echo=True, logprobs=1)
        assert got.logprobs is not None
        assert len(got.logprobs.token_logprobs) == 20
