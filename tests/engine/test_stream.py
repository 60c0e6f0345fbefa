"""What a stream tells, joined, is what the answer would have been, and comes as early as it may."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engines import running_engine
from support.processes import until

from metaseq_api.core import Completion, Delta, FinishReason, Request, SamplingParams, TokenLogprobs
from metaseq_api.engine.engine import Engine
from metaseq_api.errors import EngineStopped, MetaseqApiError, RequestError
from metaseq_api.server.app import create_app
from metaseq_api.server.port import bind
from metaseq_api.server.run import Server
from metaseq_api.settings import Settings

DEADLINE_S = 30.0
FRAGMENTS = ("the", " ", "e", "t", "th", "\u20ac", "\u20ac\u00e9", "\U0001f600", "a\u00e9", "\n\n", "zq")


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running_engine(tmp_path, ahead=getattr(request, "param", False)) as e:
        yield e


def streamed(*prompts: tuple[int, ...], **params: object) -> Request:
    return Request(request_id="s", prompts=prompts, params=SamplingParams(**params), stream=True)  # type: ignore[arg-type]


def join(deltas: list[Delta]) -> Completion:
    """The completion that one sample's deltas make."""
    lists = [d.logprobs for d in deltas if d.logprobs is not None]
    assert all(d.finish_reason is None for d in deltas[:-1])
    assert deltas[-1].finish_reason is not None
    tops = [x.top_logprobs for x in lists]
    return Completion(
        prompt_index=deltas[0].prompt_index,
        sample_index=deltas[0].sample_index,
        text="".join(d.text for d in deltas),
        token_ids=(),
        finish_reason=deltas[-1].finish_reason,
        num_prompt_tokens=0,
        num_tokens=sum(d.num_tokens for d in deltas),
        logprobs=None
        if not lists
        else TokenLogprobs(
            tokens=sum((x.tokens for x in lists), ()),
            token_logprobs=sum((x.token_logprobs for x in lists), ()),
            top_logprobs=None if tops[0] is None else sum((t for t in tops if t is not None), ()),
            text_offset=sum((x.text_offset for x in lists), ()),
        ),
    )


def joined(deltas: list[Delta]) -> list[Completion]:
    by_choice: dict[tuple[int, int], list[Delta]] = {}
    for d in deltas:
        by_choice.setdefault((d.prompt_index, d.sample_index), []).append(d)
    return [join(by_choice[key]) for key in sorted(by_choice)]


def plain(completions: list[Completion], *, digits: int = 3) -> list[object]:
    """All that a stream tells; log-probabilities rounded, for sums may be ordered otherwise in another batch."""

    def rounded(p: float | None) -> float | None:
        return None if p is None else round(p, digits)

    return [
        (
            c.prompt_index,
            c.sample_index,
            c.text,
            c.finish_reason,
            c.num_tokens,
            c.logprobs and (c.logprobs.tokens, c.logprobs.text_offset, [*map(rounded, c.logprobs.token_logprobs)]),
            c.logprobs
            and c.logprobs.top_logprobs
            and [None if t is None else (sorted(t), [*map(rounded, t.values())]) for t in c.logprobs.top_logprobs],
        )
        for c in completions
    ]


def anything(r: random.Random, engine: Engine) -> dict[str, object]:
    """Sampling fields of any kind; at high temperatures the tiny model writes bytes that are no characters."""
    max_tokens = r.choice([1, 2, 7, 20, 30])
    params: dict[str, object] = {
        "max_tokens": max_tokens,
        "min_tokens": r.choice([0, 0, 0, 1, max_tokens]),
        "temperature": r.choice([0, 0.7, 1.0, 3.0]),
        "seed": r.randrange(1000),
        "n": r.choice([1, 1, 2, 3]),
        "echo": r.random() < 0.4,
        "logprobs": r.choice([None, None, 0, 1, 4]),
        "ignore_eos": r.random() < 0.5,
        "stop": tuple(r.sample(FRAGMENTS, r.choice([0, 1, 3]))),
    }
    if r.random() < 0.1:
        params |= {"max_tokens": 0, "min_tokens": 0, "echo": True}
    return params


def some_prompt(r: random.Random, engine: Engine) -> tuple[int, ...]:
    """Ids of bytes and of text, ending anywhere, inside a character too; at times none, or the client's own </s>."""
    ids = [*r.choices(range(4, 270), k=r.randrange(0, 12)), *engine.encode(r.choice(["", "the \u20ac", "h\u00e9"]))]
    return tuple([2] * (r.random() < 0.2) + ids[: r.randrange(len(ids) + 1)])


@pytest.mark.parametrize("engine", [False, True], indirect=True, ids=["in turn", "ahead"])
@pytest.mark.parametrize("seed", range(6))
def test_a_stream_joined_is_the_answer_whatever_was_asked(engine: Engine, seed: int) -> None:
    r = random.Random(seed)
    ended = set()
    for _ in range(40):
        prompts = tuple(some_prompt(r, engine) for _ in range(r.choice([1, 1, 2])))
        params = anything(r, engine)
        whole = engine.submit(Request(request_id="w", prompts=prompts, params=SamplingParams(**params)))  # type: ignore[arg-type]
        if r.random() < 0.5 and not params["echo"]:  # a stop string that surely comes, wherever tokens cut it
            text = whole.result(DEADLINE_S)[0].text
            if len(text) > 3:
                at = r.randrange(len(text) - 1)
                params["stop"] = (text[at : at + r.randrange(1, 6)], *params["stop"])  # type: ignore[misc]
                whole = engine.submit(Request(request_id="w", prompts=prompts, params=SamplingParams(**params)))  # type: ignore[arg-type]
        got = joined(list(engine.submit(streamed(*prompts, **params)).events()))
        want = whole.result(DEADLINE_S)
        assert plain(got) == plain(want), params
        ended |= {c.finish_reason for c in want}
    assert ended == set(FinishReason)


def test_every_prefix_told_is_one_of_the_text_and_offsets_lie_in_what_was_told(engine: Engine) -> None:
    r = random.Random(11)
    for _ in range(60):
        params = {**anything(r, engine), "n": 1, "logprobs": 0}
        (prompt,) = (some_prompt(r, engine),)
        deltas = list(engine.submit(streamed(prompt, **params)).events())
        begin = 0 if params["echo"] else len(engine.decode(prompt))
        told = ""
        for d in deltas:
            told += d.text
            assert d.logprobs is not None
            if d.finish_reason is None:
                assert all(begin <= o < begin + len(told) for o in d.logprobs.text_offset)


class Steps:
    """An engine whose steps a test counts and holds: nothing runs before `go` says so."""

    def __init__(self, engine: Engine) -> None:
        self._run, self._may = engine._worker.run, threading.Semaphore(0)
        self._engine = engine
        self.num_begun = 0
        engine._worker.run = self  # type: ignore[method-assign, assignment]

    def __call__(self, batch: object) -> object:
        self.num_begun += 1
        assert self._may.acquire(timeout=DEADLINE_S)
        return self._run(batch)  # type: ignore[arg-type]

    def go(self, num: int = 1) -> None:
        self._may.release(num)

    def restore(self) -> None:
        self._engine._worker.run = self._run  # type: ignore[method-assign]
        self._may.release(1000)


@pytest.fixture
def steps(engine: Engine) -> Iterator[Steps]:
    steps = Steps(engine)
    yield steps
    steps.restore()


def script(engine: Engine, *pieces: bytes) -> None:
    """Have the sampler choose these tokens, one a step, and then the last one for ever. Bytes are tokens."""
    by_bytes = {engine._tokenizer.token_bytes(i): i for i in range(4, 263)}
    ids = iter([by_bytes[piece] for piece in pieces])
    original, last = engine._sampler.draw, by_bytes[b"z"]

    def draw(logits, rows):  # type: ignore[no-untyped-def]
        drawn = original(logits, rows)
        drawn.table[:, 0] = torch.tensor([next(ids, last) for _ in rows])
        return drawn

    engine._sampler.draw = draw  # type: ignore[method-assign]


def test_each_token_is_told_in_its_own_step(engine: Engine, steps: Steps) -> None:
    events = engine.submit(streamed((5, 6), max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)).events()
    for i in range(6):
        steps.go()  # one step, and no more, until its token has come
        delta = next(events)
        assert delta.num_tokens == 1, i


def test_only_a_possible_stop_string_is_held_back(engine: Engine, steps: Steps) -> None:
    script(engine, b"a", b"x", b"y", b"b", b"x", b"y", b"w")
    ticket = engine.submit(streamed((5,), max_tokens=30, temperature=0, stop=("xyw", "bc"), ignore_eos=True))
    came = []
    woken = threading.Event()
    ticket.watch(woken.set)
    for want in ("a", None, None, "xy", "b", None, ""):  # xy may begin xyw, b may begin bc
        steps.go()
        if want is None:
            assert not woken.wait(0.05)
            continue
        assert woken.wait(DEADLINE_S)
        woken.clear()
        came += [d.text for d in ticket.take()]
        assert came[-1] == want
    assert "".join(came) == "axyb"
    assert ticket.ended


def test_an_unfinished_character_is_held_back_until_it_is_whole(engine: Engine, steps: Steps) -> None:
    euro = "\u20ac".encode()
    script(engine, *(bytes([b]) for b in euro), b"k")
    events = engine.submit(streamed((5,), max_tokens=5, temperature=0, ignore_eos=True)).events()
    steps.go(3)
    assert next(events).text == "\u20ac"
    steps.go(1)
    assert next(events).text == "k"


def test_an_echo_comes_before_the_first_step(engine: Engine, steps: Steps) -> None:
    prompt = tuple(engine.encode("the end"))
    events = engine.submit(streamed(prompt, max_tokens=3, echo=True)).events()
    assert next(events).text == "the end"
    steps.go(3)
    assert list(events)[-1].finish_reason is not None


def test_a_cancelled_stream_ends_with_the_error_after_what_was_told(engine: Engine, steps: Steps) -> None:
    ticket = engine.submit(streamed((5, 6), max_tokens=50, temperature=0, ignore_eos=True))
    events = ticket.events()
    steps.go()
    assert next(events).num_tokens == 1
    ticket.cancel()
    steps.go()  # the one that may be under way
    free = engine.health().num_blocks
    with pytest.raises(RequestError, match="went away"):
        list(events)
    assert engine.health().num_free_blocks == free


def test_a_failing_engine_tells_what_it_had_and_then_the_error(tmp_path: Path) -> None:
    with running_engine(tmp_path, fails=True) as engine:
        steps = Steps(engine)
        ticket = engine.submit(streamed((5, 6), max_tokens=50, temperature=0, ignore_eos=True))
        events = ticket.events()
        steps.go()
        assert next(events).num_tokens == 1
        engine._worker.run = lambda batch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        steps.go(1000)
        with pytest.raises(EngineStopped, match="failed"):
            list(events)


def test_stopping_tells_every_stream(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        tickets = [engine.submit(streamed((5, i + 5), max_tokens=80, n=4, ignore_eos=True)) for i in range(20)]
        engine.stop(grace_s=0)
        endings = []
        for t in tickets:
            try:
                endings.append(len(joined(list(t.events()))))
            except MetaseqApiError:
                endings.append(0)
    assert 0 in endings
    assert set(endings) <= {0, 4}


def test_the_best_of_several_cannot_be_streamed() -> None:
    with pytest.raises(RequestError, match=r"best_of is 3.*stream") as e:
        streamed((5,), n=2, best_of=3)
    assert e.value.param == "best_of"
    streamed((5,), n=2, best_of=2)


def test_a_reader_that_comes_late_misses_nothing(engine: Engine) -> None:
    ticket = engine.submit(streamed((5, 6), max_tokens=20, temperature=0, ignore_eos=True))
    ticket.result(DEADLINE_S)
    assert sum(d.num_tokens for d in ticket.events()) == 20


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_has_its_blocks_freed_within_one_step(
    how: str, stream: bool, engine: Engine, steps: Steps
) -> None:
    server = Server(create_app(engine, Settings()), bind("127.0.0.1", 0), threads=2)
    server.start()
    body = json.dumps({"prompt": [5, 6], "max_tokens": 80, "n": 3, "stream": stream, "ignore_eos": True}).encode()
    head = f"POST /completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as sock:
            sock.sendall(head.encode() + body)
            steps.go(2)
            until(lambda: steps.num_begun == 3, "the third step")  # the third is under way, and held
            assert engine.health().num_free_blocks < engine.health().num_blocks
            if how == "half-close":
                sock.shutdown(socket.SHUT_WR)
            else:
                if how == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            until(lambda: not engine._admission._inbox.empty(), "word of the client")
            steps.go()
            until(lambda: engine.health().num_free_blocks == engine.health().num_blocks, "every block free")
            assert steps.num_begun == 3
    finally:
        server.stop(0)
