"""Other servers on the same work in turns with us, by the adapters of a harness that has one for each.

`Adapter` is ours. Knows how a contender is run and asked, and how the harness measures a server. Does not know what a
rival is.

The harness is a folder with adapters/, workload.py (the prompts) and run_peers.py (the client of servers); its --work
folder holds the models and one virtual environment for each rival. It is copied, and our adapter put in.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch

from metaseq_api import __version__
from metaseq_api.bench import contender, limits
from metaseq_api.bench.figures import Row, shown
from metaseq_api.bench.gpu_speed import answer
from metaseq_api.bench.subject import ours, subject
from metaseq_api.errors import SettingsError
from metaseq_api.machine import num_cores
from metaseq_api.settings import Settings

US = "ours"
NAMES = {US: "ours", "ov": "OpenVINO GenAI", "vllm": "vLLM", "ct2": "CTranslate2", "hf": "Hugging Face"}
METRICS = {
    "prefill": "prefill of 1024",
    "decode": "one stream: decode",
    "batch": "32 at once, prompts of 64-256 + 64: output",
}
ROUND = ("prefill", "prefill", "prefill", "decode", "decode", "batch")
"""What everybody does in turn, in each round."""
HTTP = "http_c16_stream_tps"
OVER_HTTP = "through HTTP, 16 streams: output"
_VERSIONS = {"vllm": "vllm", "ov": "genai", "ct2": "ctranslate2", "hf": "transformers"}
PATIENCE_S = 30.0
_ADAPTER = "from metaseq_api.bench.rivals import Adapter\n"
_SERVER = "{venv}/bin/python -m metaseq_api.cli.interactive_hosted {model} --port {port} --no-prefix-cache --dtype "


class Adapter:
    """What `contender` calls in a process of its own: our engine without HTTP, on the weights that everybody gets."""

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

    @property
    def folder(self) -> Path:
        """The model's, a Hugging Face one."""
        return self.work / "models" / f"opt-{self.model}-rand"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """versions: by side. stored: the folder's dtype. same: of the first eight greedy tokens after one prompt, how many
    are ours, by side.

    bandwidth: what was read before each round. Units: GB/s.
    """

    rows: list[Row]
    versions: dict[str, str]
    stored: str
    same: dict[str, int]
    bandwidth: list[float]

    def told(self) -> str:
        who = [f"{NAMES[s]} {v} ({self.same[s]} of 8 greedy tokens are ours)" for s, v in self.versions.items()]
        read = f"{shown(min(self.bandwidth))}-{shown(max(self.bandwidth))} GB/s were read before the rounds"
        return "; ".join([f"weights stored in {self.stored}", *who, read])


def measure(asked: Asked, say: Callable[[str], object]) -> Found:
    """Everybody in turns. Raises: SettingsError where the harness, or somebody in it, cannot run."""
    for path in (asked.harness / "run_peers.py", asked.folder / "config.json"):
        if not path.is_file():
            raise SettingsError(f"{path} is not there; --harness and --work name the harness and its work folder")
    with _harness(asked) as harness:
        found = _in_turns(asked, harness, say)
        if asked.serving:
            found.rows.append(_over_http(asked, harness, say))
    return found


def _in_turns(asked: Asked, harness: Path, say: Callable[[str], object]) -> Found:
    """All stay loaded, and each does one piece of work after the other: a virtual machine's speed changes by a third
    within a minute, and so it changes for all."""
    rows = {metric: Row(what=what, unit="tokens/s") for metric, what in METRICS.items()}
    bandwidths, cpu = list[float](), torch.device("cpu")
    with contextlib.ExitStack() as stack:
        ready, everyone = dict[str, Any](), dict[str, _Contender]()
        for side in (US, *asked.rivals):
            everyone[side] = stack.enter_context(_Contender(asked, harness, side))
            ready[side] = everyone[side].hear()
            say(f"{NAMES[side]} is ready")
        for number in range(asked.rounds):
            bandwidths.append(limits.bandwidth(cpu, num_cores()) / 1e9)
            for turn, metric in enumerate(ROUND):
                for side in list(everyone)[:: -1 if (number + turn) % 2 else 1]:
                    rows[metric].add(side, everyone[side].work(metric, f"{number}.{turn}"))
                say(f"round {number + 1} of {asked.rounds}: {METRICS[metric]}")
    versions = {s: str(ready[s]["info"].get(_VERSIONS[s], "unknown")) for s in asked.rivals}
    ours = ready[US]["first"]
    same = {s: sum(a == b for a, b in zip(ours, ready[s]["first"], strict=True)) for s in asked.rivals}
    return Found(rows=list(rows.values()), versions=versions, stored=_stored(asked), same=same, bandwidth=bandwidths)


def _stored(asked: Asked) -> str:
    about = json.loads((asked.folder / "config.json").read_text())
    return str(about.get("dtype") or about.get("torch_dtype") or "a dtype that its config.json does not name")


class _Contender:
    """One of them, in a process of its own (`contender`)."""

    def __init__(self, asked: Asked, harness: Path, side: str) -> None:
        python = sys.executable if side == US else str(asked.work / "venv" / side / "bin" / "python")
        command = [python, str(harness / "contender.py"), side, asked.dtype, str(asked.folder), str(num_cores())]
        self._log = asked.work / "logs" / f"{side}-{asked.model}-{asked.dtype}.log"
        self._log.parent.mkdir(exist_ok=True)
        self._side = side
        with self._log.open("w") as log:
            try:
                self._process = subprocess.Popen(
                    command, stdin=PIPE, stdout=PIPE, stderr=log, text=True, cwd=harness, start_new_session=True
                )
            except OSError as e:
                raise SettingsError(f"{python} cannot be run ({e.strerror}); the harness's set-up makes it") from e

    def hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline() if self._speaks() else ""
        if not line:
            raise SettingsError(f"{NAMES[self._side]} ended with code {self._process.wait()}; {self._log} says why")
        return json.loads(line)

    def _speaks(self) -> bool:
        """Wait until it says something or closes its end, which a child of its own may keep open when it is gone."""
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            if self._process.poll() is not None:
                return False
        return True

    def work(self, metric: str, turn: str) -> float:
        """Units: tokens/s."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is heard
            print(metric, turn, file=self._process.stdin, flush=True)
        return float(self.hear())

    def __enter__(self) -> _Contender:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


def _over_http(asked: Asked, harness: Path, say: Callable[[str], object]) -> Row:
    """Servers one after the other, by the harness's own client; round by round."""
    results = asked.work / f"results-{asked.model}-{asked.dtype}.jsonl"
    results.write_text("")
    flags: dict[str, Any] = {
        "--work": asked.work,
        "--results": results.name,
        "--models": asked.model,
        "--configs": ",".join(f"{side}:{asked.dtype}" for side in (US, *asked.serving)),
        "--rounds": asked.rounds,
        "--python": f"{US}={sys.executable}",
        "--server-cmd": f"{US}={_SERVER}{asked.dtype}",
    }
    command = [sys.executable, str(harness / "run_peers.py"), "serve", *(str(x) for f in flags.items() for x in f)]
    with subprocess.Popen(command, stdout=PIPE, text=True) as process:
        for line in process.stdout or ():
            say(line.rstrip())
    if process.returncode:
        raise SettingsError(f"the harness failed with code {process.returncode}; its words are above")
    rounds: dict[int, dict[str, list[float]]] = {}
    for said in map(json.loads, results.read_text().splitlines()):
        if said.get("metric") == HTTP:
            of = rounds.setdefault(said["round"], {})
            of.setdefault(said["config"].partition(":")[0], []).append(said["value"])
    row = Row(what=OVER_HTTP, unit="tokens/s")
    for of in rounds.values():
        if of.keys() >= {US, *asked.serving}:
            for side, values in of.items():
                row.add(side, statistics.median(values))
    if not row.values:
        raise SettingsError("there is no round in which every server answered; the harness's words are above")
    return row


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A head, and a line for each row: everybody's median with the range, and ours over the best of the others."""
    sides = [side for side in NAMES if any(side in row.values for row in rows)]
    lines = [["tokens/s", *(NAMES[side] for side in sides), "ours / best rival"]]
    for row in rows:
        line = [row.what]
        for side in sides:
            of = row.values.get(side)
            line.append(f"{shown(row.median(side))} ({shown(min(of))}-{shown(max(of))})" if of else "-")
        ratios = [_ratio(row, side) for side in row.values if side != US]
        line.append(f"{min(ratios):.2f}" if ratios else "-")
        lines.append(line)
    return lines


def _ratio(row: Row, side: str) -> float:
    """Ours over another's, turn by turn; the median of that."""
    return statistics.median(ours / its for ours, its in zip(row.values[US], row.values[side], strict=True))


@contextmanager
def _harness(asked: Asked) -> Iterator[Path]:
    """A copy that knows us."""
    with tempfile.TemporaryDirectory(prefix="metaseq-api-rivals-") as scratch:
        copy = Path(scratch, "harness")
        shutil.copytree(asked.harness, copy)
        copy.chmod(0o755)
        (copy / "adapters").chmod(0o755)
        (copy / "adapters" / f"{US}.py").write_text(_ADAPTER)
        shutil.copy(contender.__file__, copy)
        yield copy
