"""Other servers on the same work in turns with us: a harness (run_peers.py) that has an adapter for each runs them all.

`Adapter` is ours. Knows how the harness is called, and what it writes. Does not know what a rival is, or how it is run.

The harness is a folder with run_peers.py, worker.py and adapters/; its --work folder holds the models, one virtual
environment for each rival, and what was measured. It is copied, and our adapter put in, before it runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaseq_api import __version__
from metaseq_api.bench.figures import Row, shown
from metaseq_api.bench.gpu_speed import answer
from metaseq_api.bench.subject import ours, subject
from metaseq_api.errors import SettingsError
from metaseq_api.settings import Settings

US = "ours"
NAMES = {US: "ours", "ov": "OpenVINO GenAI", "vllm": "vLLM", "ct2": "CTranslate2", "hf": "Hugging Face"}
METRICS = {
    "decode_tps": "one stream: decode",
    "prefill_tps": "prefill of 1024",
    "batch_tps": "32 at once: output",
    "http_c16_stream_tps": "through HTTP, 16 streams: output",
}
_VERSIONS = {"vllm": "vllm", "ov": "genai", "ct2": "ctranslate2", "hf": "transformers"}
_ADAPTER = "from metaseq_api.bench.rivals import Adapter\n"
_SERVER = "{venv}/bin/python -m metaseq_api.cli.interactive_hosted {model} --port {port} --no-prefix-cache --dtype "


class Adapter:
    """What the harness calls in a process of its own: our engine without HTTP, on the weights that everybody gets."""

    def __init__(self, model_dir: str, precision: str, threads: int, opts: Mapping[str, str]) -> None:
        assert not opts
        # no prompt is asked twice, and no rival keeps any
        settings = Settings(dtype=precision, threads=threads, prefix_cache=False)
        self._engine = ours(subject(None, Path(model_dir), settings)).engine

    def info(self) -> dict[str, str]:
        """Versions."""
        return {"metaseq-api": __version__, "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], n_new: int) -> list[list[int]]:
        """Exactly so many tokens after each prompt, greedily."""
        return answer(self._engine, prompts, n_new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who is measured, on what. harness, work: folders. serving: who is asked through HTTP too."""

    harness: Path
    work: Path
    model: str
    dtype: str
    rivals: tuple[str, ...]
    serving: tuple[str, ...]
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """versions: by side. same: of the first eight greedy tokens after one prompt, how many are ours, by side.

    bandwidth: what the harness reads before each run. Units: GB/s.
    """

    rows: list[Row]
    versions: dict[str, str]
    same: dict[str, int]
    bandwidth: list[float]

    def told(self) -> str:
        if not self.bandwidth:
            return "nobody could be loaded; the harness's words are above"
        who = [f"{NAMES[s]} {v} ({self.same.get(s, 0)} of 8 greedy tokens are ours)" for s, v in self.versions.items()]
        read = f"the harness read {shown(min(self.bandwidth))}-{shown(max(self.bandwidth))} GB/s before its runs"
        return "; ".join([*who, read])


def measure(asked: Asked, say: Callable[[str], object]) -> Found:
    """Everybody in turns. Raises: SettingsError where the harness cannot run."""
    for path in (asked.harness / "run_peers.py", asked.work / "models" / f"opt-{asked.model}-rand" / "config.json"):
        if not path.is_file():
            raise SettingsError(f"{path} is not there; --harness and --work name the harness and its work folder")
    results = asked.work / f"results-{asked.model}-{asked.dtype}.jsonl"
    results.write_text("")
    with _harness(asked) as command:
        everyone = (US, *asked.rivals)
        _run([*command("run", everyone, results), "--metrics", "decode,prefill,batch"], say)
        if asked.serving:
            server = f"{US}={_SERVER}{asked.dtype}"
            _run([*command("serve", (US, *asked.serving), results), "--server-cmd", server], say)
    return read(results.read_text().splitlines())


def read(lines: Sequence[str]) -> Found:
    """What the harness wrote; values that another program disturbed were measured again, and only the last counts."""
    found: dict[tuple[str, str, int, int], float] = {}
    versions, bandwidth = dict[str, str](), list[float]()
    first: dict[str, list[int]] = {}
    for num, line in enumerate(lines):
        said = json.loads(line)
        peer = said.get("config", "").partition(":")[0]
        if said.get("metric") in METRICS:
            again = said.get("rep", num)  # over HTTP nothing is measured again
            found[said["metric"], peer, said["round"], again] = said["value"]
        elif said.get("event") == "loaded":
            bandwidth.append(said["membw"])
            if peer in _VERSIONS:
                versions[peer] = str(said["info"].get(_VERSIONS[peer], "unknown"))
        elif said.get("event") == "check":
            first[peer] = said["first8"]
    rows = {metric: Row(what=what, unit="tokens/s") for metric, what in METRICS.items()}
    for (metric, peer, *_), value in found.items():
        rows[metric].add(peer, value)
    same = {s: sum(a == b for a, b in zip(first.get(US, []), first[s], strict=False)) for s in first if s != US}
    return Found(rows=[row for row in rows.values() if row.values], versions=versions, same=same, bandwidth=bandwidth)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A head, and a line for each row: everybody's median with the range, and ours over the best of the others."""
    sides = [side for side in NAMES if any(side in row.values for row in rows)]
    lines = [["tokens/s", *(NAMES[side] for side in sides), "ours / best rival"]]
    for row in rows:
        line = [row.what]
        for side in sides:
            of = row.values.get(side)
            line.append(f"{shown(row.median(side))} ({shown(min(of))}-{shown(max(of))})" if of else "-")
        best = max((row.median(side) for side in row.values if side != US), default=0.0)
        line.append(f"{row.median(US) / best:.2f}" if US in row.values and best else "-")
        lines.append(line)
    return lines


@contextmanager
def _harness(asked: Asked) -> Iterator[Callable[[str, Sequence[str], Path], list[str]]]:
    """A copy that knows us: the beginning of a command, from its word, the sides and where to write."""
    with tempfile.TemporaryDirectory(prefix="metaseq-api-rivals-") as scratch:
        copy = Path(scratch, "harness")
        shutil.copytree(asked.harness, copy)
        copy.chmod(0o755)
        (copy / "adapters").chmod(0o755)
        (copy / "adapters" / f"{US}.py").write_text(_ADAPTER)

        def command(word: str, sides: Sequence[str], results: Path) -> list[str]:
            flags: dict[str, Any] = {
                "--work": asked.work,
                "--results": results.name,
                "--models": asked.model,
                "--configs": ",".join(f"{side}:{asked.dtype}" for side in sides),
                "--rounds": asked.rounds,
                "--python": f"{US}={sys.executable}",
            }
            told = [str(part) for flag in flags.items() for part in flag]
            return [sys.executable, str(copy / "run_peers.py"), word, *told]

        yield command


def _run(command: Sequence[str], say: Callable[[str], object]) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            say(line.rstrip())
    if process.returncode:
        raise SettingsError(f"the harness failed with code {process.returncode}; its words are above")
