"""LLM in this process: Hugging Face's OPT is the oracle for what it says and for what it holds likely."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import tiny_tokenizer
from support.engines import slow_down, tiny_model
from support.hf_opt import logits
from support.processes import clean_env, until

from metaseq_api import LLM, SamplingParams
from metaseq_api.errors import CheckpointNotFound, EngineStopped, RankFailed, RequestError, SettingsError

GREEDY = SamplingParams(max_tokens=12, temperature=0)
TEXTS = ["the cat", "Hello, wörld", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as Hugging Face saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.write(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", dtype="fp32") as llm:
        yield llm


def hf_greedy(ids: list[int], num: int) -> list[int]:
    """The likeliest tokens after </s> and `ids`, neither padding nor those that only pad the vocabulary."""
    model, out = tiny_model(), [2, *ids]
    for _ in range(num):
        row = logits(model, out)[-1, :263].clone()
        row[1] = -torch.inf
        out.append(int(row.argmax()))
        if out[-1] == 2:
            return out[1 + len(ids) : -1]
    return out[1 + len(ids) :]


def test_it_says_what_hugging_face_says(llm: LLM) -> None:
    found = llm.generate(TEXTS, GREEDY)
    assert [g.prompt for g in found] == TEXTS
    for text, g in zip(TEXTS, found, strict=True):
        want = hf_greedy(llm.encode(text), 12)
        assert list(g.token_ids) == want
        assert g.text == llm.decode(want)
        assert g.finish_reason.value == ("stop" if len(want) < 12 else "length")


def test_scores_are_hugging_faces_log_softmax(llm: LLM) -> None:
    model = tiny_model()
    for text, score in zip(TEXTS, llm.score(TEXTS), strict=True):
        ids = llm.encode(text)
        want = logits(model, [2, *ids]).log_softmax(-1)[range(len(ids)), ids]
        assert list(score.token_ids) == ids
        assert "".join(score.tokens[:1]) == llm.decode(ids[:1])
        assert torch.allclose(torch.tensor(score.token_logprobs), want, atol=2e-5)
        assert score.logprob == pytest.approx(float(want.sum()), abs=1e-4)


def test_a_text_of_nothing_scores_nothing(llm: LLM) -> None:
    (score,) = llm.score("")
    assert (score.tokens, score.logprob) == ((), 0)


def test_a_prompt_may_be_a_text_ids_or_a_list_of_either(llm: LLM) -> None:
    ids = llm.encode("the cat")
    (want,) = llm.generate("the cat", GREEDY)
    assert [g.text for g in llm.generate(["the cat", ids, tuple(ids)], GREEDY)] == [want.text] * 3
    for prompt in (ids, torch.tensor(ids), torch.tensor(ids).numpy()):
        (found,) = llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
        assert (found.text, found.prompt) == (want.text, tuple(ids))
    assert llm.generate([], GREEDY) == []


def test_params_may_be_one_for_each_prompt(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=k, ignore_eos=True, n=k) for k in (1, 2, 3)]
    found = llm.generate(TEXTS, each)
    assert [len(g.texts) for g in found] == [1, 2, 3]
    assert [len(g.token_ids) for g in found] == [1, 2, 3]
    with pytest.raises(RequestError, match="2 params for 3 prompts"):
        llm.generate(TEXTS, each[:2])


def test_more_prompts_than_are_pending_at_once_come_back_in_order(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, temperature=0)
    ids = [[4 + i % 250] for i in range(1500)]
    one = {i: g.text for i, g in zip(range(250), llm.generate(ids[:250], params), strict=True)}
    assert [g.text for g in llm.generate(ids, params)] == [one[i % 250] for i in range(1500)]


def test_a_seeded_text_is_the_same_alone_and_among_others(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=7)
    alone = [llm.generate(t, params)[0].text for t in TEXTS]
    assert [g.text for g in llm.generate(TEXTS, params)] == alone


def test_threads_may_all_call_at_once(llm: LLM) -> None:
    want = [g.text for g in llm.generate(TEXTS, GREEDY)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: llm.generate(TEXTS[i % 3], GREEDY)[0].text, range(48)))
    assert found == want * 16


def test_the_streamed_pieces_are_the_text(llm: LLM) -> None:
    pieces = list(llm.stream("the cat", GREEDY))
    assert "".join(pieces) == llm.generate("the cat", GREEDY)[0].text
    assert len(pieces) > 1


def test_deltas_tell_every_sample_and_its_end(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=2, seed=3, logprobs=1)
    texts, ends = ["", ""], ["", ""]
    for d in llm.deltas("the cat", params):
        texts[d.sample_index] += d.text
        ends[d.sample_index] = d.finish_reason.value if d.finish_reason else ends[d.sample_index]
    assert tuple(texts) == llm.generate("the cat", params)[0].texts
    assert all(ends)
    with pytest.raises(RequestError, match=r"n is 2.*deltas"):
        llm.stream("the cat", params)


def idle(llm: LLM) -> bool:
    health = llm._resident.engine.health()
    return health.num_running == health.num_waiting == 0 and health.num_free_blocks == health.num_blocks


def test_to_stop_reading_a_stream_is_to_stop_generating(llm: LLM) -> None:
    stream = llm.stream("x", SamplingParams(max_tokens=90, ignore_eos=True))
    next(stream)
    del stream
    gc.collect()
    until(lambda: idle(llm), "the blocks to be free")


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        ("x", SamplingParams(max_tokens=1000), "window"),
        ([["a"]], None, "a prompt is"),
        ([b"abc"], None, "a prompt is b'abc'"),
        ([[1, 9999]], None, "9999"),
        ([3.5], None, "a prompt is 3.5"),
        ("x", SamplingParams(n=1.5), "n is 1.5; it must be of type int"),  # type: ignore[arg-type]
        ("x", SamplingParams(max_tokens=True), "max_tokens is True"),
        (["x", "y"], [GREEDY, SamplingParams(n=1, echo=1)], "echo is 1"),  # type: ignore[arg-type]
    ],
)
def test_a_mistake_is_told_and_leaves_the_model_as_it_was(
    llm: LLM, prompts: list[str], params: SamplingParams, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate(prompts, params)
    until(lambda: idle(llm), "the blocks to be free")
    assert llm.generate("the cat", GREEDY)[0].token_ids


def test_one_wrong_prompt_of_many_gives_up_the_others(llm: LLM) -> None:
    with pytest.raises(RequestError, match="9999"):
        llm.generate([[5]] * 200 + [[9999]], SamplingParams(max_tokens=90, ignore_eos=True))
    until(lambda: idle(llm), "the blocks to be free")


def test_stop_may_be_one_string_or_a_list(llm: LLM) -> None:
    text = llm.generate("the cat", GREEDY)[0].text
    for stop in (text[4:6], [text[4:6]]):
        params = SamplingParams(max_tokens=12, temperature=0, stop=stop)  # type: ignore[arg-type]
        assert params.stop == (text[4:6],)
        assert llm.generate("the cat", params)[0].text == text[: text.index(text[4:6])]


def test_settings_are_held_to_what_they_may_be(folder: Path) -> None:
    with pytest.raises(SettingsError, match="dtype is 'fp64'"):
        LLM(folder, dtype="fp64")
    with pytest.raises(SettingsError, match=r"MAX_SEQ_LEN.*1000"):
        LLM(folder, max_seq_len=1000)
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        LLM(folder / "nowhere")


def test_closed_it_says_so_and_its_thread_is_gone(folder: Path) -> None:
    before = set(threading.enumerate())
    with LLM(folder) as llm:
        assert len(set(threading.enumerate()) - before) == 1
    assert not set(threading.enumerate()) - before
    llm.close()
    with pytest.raises(EngineStopped, match="closed"):
        llm.generate("x")


def test_closing_answers_whoever_still_waits(folder: Path) -> None:
    llm = LLM(folder)
    slow_down(llm._resident.engine)
    stream = llm.stream("x", SamplingParams(max_tokens=90, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(EngineStopped):
        list(stream)


def test_forgotten_it_ends_by_itself(folder: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(folder)
    ref = weakref.ref(llm)
    llm.generate("x")
    del llm
    gc.collect()
    assert ref() is None
    until(lambda: not set(threading.enumerate()) - before, "the thread to end")


def test_a_failing_engine_is_a_rank_failed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with LLM(folder) as llm:
        llm._resident.engine._worker.run = None  # type: ignore[assignment, method-assign]
        for _ in range(2):
            with pytest.raises(RankFailed, match="the engine failed"):
                llm.generate("x")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, metaseq_api; metaseq_api.SamplingParams(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=clean_env(), timeout=60, check=False).returncode == 0


def test_python_c_with_no_checkpoint_named_runs_the_demo_model_and_says_nothing_else(tmp_path: Path) -> None:
    code = (
        "import json; from metaseq_api import LLM, SamplingParams;"
        "print(json.dumps([g.text for g in LLM().generate('Return the', SamplingParams(temperature=0))]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=clean_env(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)[0].startswith(" string")
