"""An engine at the other end of a line answers as it does here, and nobody waits for one that has gone."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.engines import ask, running_engine
from support.processes import until

from metaseq_api.core import Delta, FinishReason, Request, SamplingParams, TokenLogprobs, line
from metaseq_api.core.line import Line, written
from metaseq_api.engine import outlet
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.outlet import Outlet
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.ticket import Ticket
from metaseq_api.errors import EngineStopped, NotBegun, Overloaded, RequestError
from metaseq_api.server.remote import Facts, RemoteEngine, _delta
from metaseq_api.tokenizer import Tokenizer

LOGPROBS = TokenLogprobs(
    tokens=("a", "b"), token_logprobs=(None, -0.5), top_logprobs=(None, {"b": -0.5, "c": -1.5}), text_offset=(0, 1)
)


class Pair:
    """An engine, and the same as its front end has it; `gone` is set when the engine hears that that has gone."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        here, there = socket.socketpair()
        self.engine, self.gone = engine, threading.Event()
        self.line = Line(there)
        facts = Facts(model_name="tiny", max_seq_len=engine.max_seq_len, vocab_size=engine.vocab_size)
        self.remote = RemoteEngine(self.line, facts, tokenizer)
        Outlet(engine, Line(here), self.gone.set).start()
        self.hearing = threading.Thread(target=self._hear)
        self.hearing.start()

    def _hear(self) -> None:
        for what, *of in self.line.messages():
            self.remote.hear(what, *of)
        self.remote.lose()

    def end(self) -> None:
        self.line.hang_up()
        self.hearing.join(10)
        assert self.gone.wait(10)


@contextlib.contextmanager
def paired(folder: Path, **more: object) -> Iterator[Pair]:
    with running_engine(folder, **more) as engine:  # type: ignore[arg-type]
        pair = Pair(engine, engine._tokenizer)
        yield pair
        pair.end()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with paired(tmp_path) as both:
        yield both


def request(*prompts: tuple[int, ...], stream: bool = False, **params: object) -> Request:
    asked = SamplingParams(**{"max_tokens": 6, "seed": 3, **params})  # type: ignore[arg-type]
    return Request(request_id="r", prompts=prompts, params=asked, stream=stream)


PARAMS: list[dict[str, object]] = [
    {},
    {"n": 2, "best_of": 3, "logprobs": 2},
    {"echo": True, "logprobs": 1, "prompt_logprobs": 2},
    {"max_tokens": 0, "echo": True},
    {"stop": ("e", "th"), "n": 3},
    {"alpha_presence": 1.0, "lambda_decay": 0.9, "top_p": 0.8, "logit_bias": ((5, 3.0),)},
]


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: ",".join(p) or "plain")
def test_an_answer_is_the_same_over_the_line(params: dict[str, object], pair: Pair) -> None:
    asked = request((5, 6, 7), (8, 9), **params)
    assert pair.remote.submit(asked).result(30) == pair.engine.submit(asked).result(30)


@pytest.mark.parametrize("params", [p for p in PARAMS if "best_of" not in p], ids=lambda p: ",".join(p) or "plain")
def test_a_stream_is_the_same_over_the_line(params: dict[str, object], pair: Pair) -> None:
    asked = request((5, 6, 7), (8, 9), stream=True, **params)

    def told(deltas: Iterator[Delta]) -> dict[tuple[int, int], list[Delta]]:
        by_choice: dict[tuple[int, int], list[Delta]] = {}
        for delta in deltas:
            by_choice.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
        return by_choice

    assert told(pair.remote.submit(asked).events()) == told(pair.engine.submit(asked).events())


def test_an_echoed_prompt_with_its_scores_is_not_written_down_by_the_engines_thread(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: dict[int, set[str]] = {}

    def noted(what: str, *of: Any) -> bytes:
        scored = [d.logprobs for _, deltas in (of[0] if what == "told" else ()) for d in deltas]
        for logprobs in scored:
            writers.setdefault(len(logprobs.tokens), set()).add(threading.current_thread().name)
        return written(what, *of)

    monkeypatch.setattr(outlet, "written", noted)
    monkeypatch.setattr(line, "written", noted)
    asked = request(tuple(range(5, 45)), stream=True, echo=True, logprobs=3)
    deltas = list(pair.remote.submit(asked).events())
    assert "".join(d.text for d in deltas) == pair.engine.submit(asked).result(30)[0].text
    few = set().union(*(names for num, names in writers.items() if num <= outlet.FEW))
    many = set().union(*(names for num, names in writers.items() if num > outlet.FEW))
    assert (many, "line sends" in few, bool(few)) == ({"line sends"}, False, True)


@pytest.mark.parametrize("logprobs", [None, LOGPROBS], ids=["bare", "scored"])
@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_a_delta_comes_as_it_was_and_of_the_same_types(
    reason: FinishReason | None, logprobs: TokenLogprobs | None
) -> None:
    told = Delta(0, 1, "text \u20ac", 3, reason, logprobs)
    (plain,) = json.loads(written(told)[4:])
    came = _delta(*plain)
    assert came == told
    assert list(map(type, came)) == list(map(type, told))


def test_what_is_refused_is_refused_by_name(pair: Pair) -> None:
    too_long = request((5,), max_tokens=1000)
    with pytest.raises(RequestError) as told:
        pair.remote.submit(too_long).result(30)
    assert told.value.param == "max_tokens"
    refused = pair.remote.submit(request((5,), max_tokens=1000, stream=True))
    until(lambda: refused.ended, "its end")
    assert not refused.admitted  # so the head of the stream, which is not sent before, is an error's
    with pytest.raises(RequestError):
        refused.take()
    taken = pair.remote.submit(request((5,), stream=True))
    assert list(taken.events())
    assert taken.admitted


def test_when_to_come_again_crosses_too(tmp_path: Path) -> None:
    with paired(tmp_path, max_queue=1) as pair, pytest.raises(Overloaded) as told:
        pair.remote.submit(request((5,), (6,))).result(30)
    assert told.value.retry_after_s is not None


def test_an_answer_that_was_kept_comes_though_the_engine_has_nothing_to_do(tmp_path: Path) -> None:
    with paired(tmp_path, results=ResultCache(8, 0)) as pair:
        first = pair.remote.submit(request((5, 6))).result(30)
        assert pair.remote.submit(request((5, 6))).result(30) == first
        deltas = list(pair.remote.submit(request((5, 6), stream=True)).events())
        assert "".join(d.text for d in deltas) == first[0].text


def test_a_word_is_said_behind_whatever_of_its_answer_waited() -> None:
    ask = request((5,), stream=True)
    ticket = Ticket(ask, lambda t: None)
    engine = cast("Any", SimpleNamespace(submit=lambda r: ticket))
    here, there = map(Line, socket.socketpair())
    outlet = Outlet(engine, here, lambda: None)

    def heard() -> list[Any]:
        return there.heard() or []

    ticket.push(Delta(0, 0, "a", 1))  # before anybody was there to hear it
    outlet._submit(7, ask)
    assert heard() == [["told", [[7, []]]], ["told", [[7, [[0, 0, "a", 1, None, None]]]]]]
    assert ticket.say("b")
    ticket.push(Delta(0, 0, "cc", 2))
    assert not ticket.say("d")
    ticket.push(Delta(0, 0, "d", 1))
    ticket.notify()
    outlet._tell()
    rest = [[0, 0, "cc", 2, None, None], [0, 0, "d", 1, None, None]]
    assert heard() == [["words", [7], ["b"]], ["told", [[7, rest]]]]
    assert ticket.say("e")
    ticket.push(Delta(0, 0, "f", 1, FinishReason.LENGTH))
    ticket.end([])
    ticket.notify()
    outlet._tell()
    last = [[0, 0, "f", 1, "length", None]]
    assert heard() == [["words", [7], ["e"]], ["told", [[7, last]]], ["answered", 7, None]]
    for end in (here, there):
        end.hang_up()
        assert list(end.messages()) == []


def test_a_step_is_told_in_portions(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaseq_api.engine.words.PORTION", 2)
    sizes, hear = [], pair.remote.hear

    def note(what: str, *of: Any) -> None:
        if what == "words":
            sizes.append(len(of[0]))
        hear(what, *of)

    pair.remote.hear = note  # type: ignore[method-assign]
    asked = request((5,), max_tokens=20, ignore_eos=True, stream=True, temperature=0)
    streams = [pair.remote.submit(asked) for _ in range(5)]
    texts = {"".join(d.text for d in stream.events()) for stream in streams}
    assert len(texts) == 1
    assert max(sizes) == 2
    assert sum(sizes) > 50, "nearly every token is a word"


def test_a_cancelled_request_frees_its_blocks(pair: Pair) -> None:
    answer = pair.remote.submit(request((5,), max_tokens=90, ignore_eos=True, stream=True))
    answer.cancel()
    with pytest.raises(RequestError, match="went away"):
        list(answer.events())
    until(lambda: pair.engine.health().num_free_blocks == pair.engine.health().num_blocks, "the blocks to be free")


def test_how_the_engine_is_is_told(pair: Pair) -> None:
    pair.remote.submit(request((5, 6))).result(30)
    health = pair.remote.health()
    assert (health.alive, health.ready, health.num_blocks) == (True, True, 64)
    assert pair.remote.stats.generation_tokens == pair.engine.stats.generation_tokens > 0
    assert pair.remote.encode("the") == pair.engine.encode("the")


def test_an_engine_that_says_nothing_is_stuck(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaseq_api.server.remote.ASK_S", 0.05)
    held = threading.Event()
    monkeypatch.setattr(pair.engine, "health", lambda: held.wait(10))
    health = pair.remote.health()
    assert (health.alive, health.stuck, health.ready) == (True, True, False)
    monkeypatch.undo()
    held.set()


def test_who_waits_is_told_when_the_engine_ends(tmp_path: Path) -> None:
    with paired(tmp_path) as pair:
        asked = request((5,), max_tokens=90, ignore_eos=True)
        running = [pair.remote.submit(asked) for _ in range(8)]
        pair.engine.end_by(time.monotonic())
        for answer in running:
            with pytest.raises(EngineStopped):
                answer.result(30)
        with pytest.raises(NotBegun):
            pair.remote.submit(asked).result(30)


def test_who_waits_is_told_when_the_other_process_has_gone(pair: Pair) -> None:
    asked = request((5,), max_tokens=90, ignore_eos=True)
    waiting = [pair.remote.submit(asked) for _ in range(8)]
    pair.line.hang_up()
    for answer in waiting:
        with pytest.raises(EngineStopped):
            answer.result(30)
    with pytest.raises(NotBegun):
        pair.remote.submit(asked)
    assert not pair.remote.health().alive
    assert pair.gone.wait(10)
    until(lambda: not pair.engine.health().num_running, "the engine to give the requests up")


def test_many_threads_ask_at_once(pair: Pair) -> None:
    alone = ask(pair.engine, [5, 6, 7], max_tokens=6, seed=3)
    answers: list[object] = []

    def client() -> None:
        for _ in range(10):
            (got,) = pair.remote.submit(request((5, 6, 7))).result(30)
            answers.append(got.token_ids)

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [alone[0].token_ids] * 80
