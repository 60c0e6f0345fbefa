"""EleutherAI's lm-eval, unmodified, measures the served demo model as it measures the same weights under Hugging Face.

Its `local-completions` asks the real service, its `hf` loads what scripts/to_hugging_face made of the same checkpoint:
scores are equal to 1e-3, each example's log-likelihood to 1e-4, each generated text letter by letter.

The `</s>` in front: transformers' OPT tokenizer puts it there, and this service does where the prompt has none. So
`add_bos_token=True`, which has lm-eval send it, is `hf` as it comes in every kind of task; without it the service adds
it to what is sent, which is the same but for loglikelihood_rolling: there it is `hf` with add_bos_token=False.
`tokenized_requests=False` writes that token as letters where a context is empty, and letters they are to this service.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from metaseq_api.scripts.to_hugging_face import main as to_hugging_face
from support import lm_eval_driver
from support.processes import clean_env
from support.service import Service

from metaseq_api.settings import DEMO
from metaseq_api.tokenizer import Tokenizer, find_files

pytestmark = [
    pytest.mark.clients,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: make test-clients does it"),
]

WINDOW = 512
CHOICE, BARE, ROLLING, GENERATE = "tiny_choice", "tiny_bare", "tiny_rolling", "tiny_generate"
EVERY = [CHOICE, BARE, ROLLING, GENERATE]
CHOICES: list[tuple[str, list[str]]] = [
    ("Return the", [" string of", " string.", " number of elements in the list.", " purple."]),
    ("Raise ValueError if", [" the value is not found.", " it rains.", " not."]),
    ("This method is called when the", [" object is created.", " Ünïcode € naïve ☃ ends.", "\n\n"]),
    ("def read(self, size=-1):\n    ", ["pass", '"""Read at most size bytes."""', "    return"]),
    ("Options are ", ["given as a dictionary.", "lost"]),  # lm-eval moves the space to the continuation
]
BARE_CHOICES = [("", ["Return True if the file exists.", "The the the the."]), ("", ["class A:", "purple"])]
TEXTS = [
    "Return the number of elements in the list, or raise an IndexError if it is empty.",
    "Ünïcode €, naïve ☃ and 日本語: what a byte-level tokenizer cuts in the middle of characters.",
    "x",
    "for line in file:\n    print(line, end='')\n\n" * 9,
]
CONTEXTS = ["Return the", "Raise ValueError if", "class Queue:\n", "The default is", "Ünïcode €"]
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS: dict[str, dict[str, Any]] = {
    CHOICE: _CHOICE,
    BARE: _CHOICE,
    ROLLING: {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    GENERATE: {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n\n", ";", "rn t", "(", "))", "]]"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def long_choice() -> tuple[str, list[str]]:
    """As long as lm-eval makes a request: WINDOW - 1 tokens, beside which it asks for one."""
    tokenizer = Tokenizer.load(*find_files(DEMO, None, None), model_vocab_size=2512)
    context, rest = "Return the length of the list. " * 80, " It is a number."
    while len(tokenizer.encode(context + rest)) > WINDOW - 1:
        context = context[1:]
    assert len(tokenizer.encode(context + rest)) == WINDOW - 1
    return context.rstrip(), [rest, " No."]


def write_tasks(folder: Path) -> None:
    """JSON is YAML."""
    docs = {
        CHOICE: [{"context": c, "choices": options, "answer": 0} for c, options in (*CHOICES, long_choice())],
        BARE: [{"context": c, "choices": options, "answer": 0} for c, options in BARE_CHOICES],
        ROLLING: [{"text": text} for text in TEXTS],
        GENERATE: [{"context": context, "target": " string"} for context in CONTEXTS],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]), "utf-8")
        place = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **place, **task}), "utf-8")


def api(url: str, tokenizer: Path | None, tasks: list[str], batch_size: int = 1, **more: Any) -> dict[str, Any]:
    args = {"model": "demo", "base_url": f"{url}/v1/completions", "max_length": WINDOW, **more}
    args |= {"tokenizer_backend": None} if tokenizer is None else {"tokenizer": str(tokenizer)}
    if tokenizer is not None:
        args["tokenizer_backend"] = "huggingface"
    return {"model": "local-completions", "model_args": args, "tasks": tasks, "batch_size": batch_size}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each way of asking came to, by its name; the service is found idle afterwards."""
    top = tmp_path_factory.mktemp("lm_eval")
    converted, tasks = top / "hf", top / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    assert to_hugging_face(["--input", str(DEMO), "--output", str(converted), "--output-dtype", "fp32"]) == 0
    hf = {"model": "hf", "model_args": {"pretrained": str(converted), "dtype": "float32"}}
    service = Service(top, "--dtype", "fp32", "--device", "cpu")
    try:
        url = str(service.url)
        runs = {
            "hf": {**hf, "tasks": EVERY},
            "hf without </s>": {**hf, "model_args": hf["model_args"] | {"add_bos_token": False}, "tasks": [ROLLING]},  # type: ignore[operator]
            "sent </s>": api(url, converted, EVERY, add_bos_token=True),
            "batched": api(url, converted, EVERY, 3, add_bos_token=True, num_concurrent=4),
            "as it comes": api(url, converted, EVERY),
            "texts": api(url, converted, [CHOICE, GENERATE], 2, tokenized_requests=False),
            "no tokenizer": api(url, None, [GENERATE], eos_string="</s>"),
        }
        plan, out = top / "plan.json", top / "out.json"
        plan.write_text(json.dumps({"tasks": str(tasks), "runs": runs}))
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(top / "home"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, lm_eval_driver.__file__, plan, out],
            env=clean_env(**offline),
            capture_output=True,
            text=True,
            cwd=top,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "API request failed" not in done.stderr
        assert service.running == 0
        yield json.loads(out.read_text("utf-8"))
    finally:
        service.kill()


def flat(resps: Any) -> list[Any]:
    """Numbers, truths and texts of a nest of lists."""
    return [x for r in resps for x in flat(r)] if isinstance(resps, list) else [resps]


SAME = [
    ("sent </s>", EVERY, "hf"),
    ("batched", EVERY, "hf"),
    ("as it comes", [CHOICE, BARE, GENERATE], "hf"),
    ("as it comes", [ROLLING], "hf without </s>"),
    ("texts", [CHOICE, GENERATE], "hf"),
    ("no tokenizer", [GENERATE], "hf"),
]


@pytest.mark.parametrize(("way", "task", "want"), [(way, task, want) for way, tasks, want in SAME for task in tasks])
def test_lm_eval_finds_what_it_finds_under_hugging_face(
    way: str, task: str, want: str, measured: dict[str, Any]
) -> None:
    ours, theirs = measured[way][task], measured[want][task]
    assert len(ours["each"]) == len(theirs["each"]) > 1
    for mine, his in zip(map(flat, ours["each"]), map(flat, theirs["each"]), strict=True):
        assert mine == [pytest.approx(x, abs=1e-4) if isinstance(x, float) else x for x in his]
    assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-3, abs=1e-3)


def test_the_tasks_tell_models_apart(measured: dict[str, Any]) -> None:
    """Equal scores would say little where every answer was the same, or nothing was scored."""
    choices = [flat(r) for r in measured["hf"][CHOICE]["each"]]
    assert {x for c in choices for x in c if isinstance(x, bool)} == {True, False}
    assert all(x < 0 for c in choices for x in c if isinstance(x, float))
    assert 0 < measured["hf"][CHOICE]["scores"]["acc,none"] < 1
    texts = [t for (t,) in map(flat, measured["hf"][GENERATE]["each"])]
    assert len(set(texts)) == len(CONTEXTS)
    assert all(texts)
