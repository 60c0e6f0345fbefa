"""What one service is told: flags over constants.py over what the checkpoint says over defaults; frozen.

Knows metaseq's names for constants.py and what each may hold. Does not know the checkpoint. The only library file
beside the rendezvous that reads the environment. A door calls `load` once and passes the Settings down.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaseq_api.errors import SettingsError

ENV_CONSTANTS = "METASEQ_API_CONSTANTS"
ENV_API_KEY = "METASEQ_API_KEY"
"""One key that clients must send. Not a flag, which every user of the machine could see, nor in constants.py."""
DTYPES = ("fp32", "fp16", "bf16")
DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One service. None means: decide from the checkpoint or the machine."""

    checkpoint: Path = DEMO
    bpe_vocab: Path | None = None
    bpe_merges: Path | None = None
    host: str = "127.0.0.1"
    port: int = 6010
    model_parallel: int | None = None
    """Ranks that one model is split over."""
    dtype: str | None = None
    """fp32, fp16 or bf16; None: as stored on a GPU, fp32 on a CPU."""
    device: str | None = None
    """cuda or cpu; None: cuda where there is a GPU."""
    max_seq_len: int | None = None
    """Units: tokens of prompt and completion; None: the model's window."""
    max_batch_tokens: int = 2048
    """Units: tokens fed in one step, over all sequences."""
    max_batch_size: int = 256
    """Sequences that run at once."""
    max_beam: int = 16
    """Most samples (n, best_of) of one prompt."""
    block_size: int = 32
    """Units: tokens per block of the KV cache."""
    cache_tokens: int | None = None
    """Units: tokens the KV cache holds; None: what memory allows, within bounds."""
    prefix_cache: bool = True
    """Whether prompts that begin alike are computed from where they differ."""
    cuda_graphs: bool = True
    """Whether a GPU replays its decode steps as CUDA graphs."""
    run_ahead: bool | None = None
    """Whether a step is started before what the one before drew has been read; None: on a GPU."""
    cache_size: int = 0
    """Whole answers kept for requests that ask the same again; 0: none."""
    cache_list_size: int = 0
    """Different answers kept for a request that draws at random, before these are given; 0: it is always computed."""
    max_queue: int = 4096
    """Sequences that may wait; more are refused with 429."""
    threads: int | None = None
    """CPU threads of one rank; None: the cores divided by the ranks of this machine."""
    timeout_s: float = 30.0
    """Units: seconds without a sign of life after which a rank counts as lost."""
    grace_s: float | None = None
    """Units: seconds that running requests have at most when the service ends; None: what SLURM leaves, else 30."""
    interface: str | None = None
    """Network interface by which ranks of several nodes reach each other; None: that of SLURM's name of the node."""
    metaseq_compat: bool = False
    """Whether /completions takes and answers as metaseq did, quirks included (docs/fields.md)."""
    keys_file: Path | None = None
    """Hashes of the keys that clients must send one of (metaseq-api-keys)."""
    api_key_file: Path | None = None
    """One key as it is, in a file that nobody else can read; made where it is missing."""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    """One key, from the environment or made for this run."""
    no_keys: bool = False
    """Whether anybody may use a service that listens beyond this machine."""
    guard_metrics: bool = False
    """Whether /metrics asks for a key too."""
    cors_origins: str | None = None
    """Origins, with commas between, whose pages may call this service from a browser; "*" means any."""
    request_timeout_s: float | None = None
    """Units: seconds that a request has at most, and where it says nothing; None: as long as it takes."""
    chat_template: Path | None = None
    """A Jinja2 template that makes a conversation a prompt, as Hugging Face's; None: User: and Assistant: lines."""
    registry: Path | None = None
    """The folder of services where this one tells how it is; None: nowhere."""
    service: str | None = None
    """Its name there."""
    member: int = 0
    """Its number among services of one name."""
    successor: int | None = None
    """How many members the service has, where each submits the job that takes over from it; None: none does."""
    job: str | None = None
    """The SLURM job it is in."""
    demo: bool = False
    """Whether no checkpoint was named, so that the embedded one serves."""


# constants.py: metaseq's name -> the field it sets
_NAMES: dict[str, str] = {
    "CHECKPOINT_FOLDER": "checkpoint",
    "MODEL_FILE": "checkpoint",
    "BPE_VOCAB": "bpe_vocab",
    "BPE_MERGES": "bpe_merges",
    "DEFAULT_HOST": "host",
    "DEFAULT_PORT": "port",
    "MODEL_PARALLEL": "model_parallel",
    "DTYPE": "dtype",
    "DEVICE": "device",
    "MAX_SEQ_LEN": "max_seq_len",
    "MAX_BATCH_TOKENS": "max_batch_tokens",
    "MAX_BATCH_SIZE": "max_batch_size",
    "MAX_BEAM": "max_beam",
    "BLOCK_SIZE": "block_size",
    "CACHE_TOKENS": "cache_tokens",
    "PREFIX_CACHE": "prefix_cache",
    "CUDA_GRAPHS": "cuda_graphs",
    "RUN_AHEAD": "run_ahead",
    "CACHE_SIZE": "cache_size",
    "CACHE_LIST_SIZE": "cache_list_size",
    "MAX_QUEUE": "max_queue",
    "THREADS": "threads",
    "TIMEOUT_S": "timeout_s",
    "GRACE_S": "grace_s",
    "INTERFACE": "interface",
    "METASEQ_COMPAT": "metaseq_compat",
    "KEYS_FILE": "keys_file",
    "API_KEY_FILE": "api_key_file",
    "NO_KEYS": "no_keys",
    "GUARD_METRICS": "guard_metrics",
    "CORS_ORIGINS": "cors_origins",
    "REQUEST_TIMEOUT_S": "request_timeout_s",
    "CHAT_TEMPLATE": "chat_template",
}
# flags that are not called after their field
_FLAGS = {"grace_s": "--grace"}
# names an old constants.py may still hold; what they said is decided elsewhere now
_RETIRED: dict[str, str] = {
    "TOTAL_WORLD_SIZE": "checked against MODEL_PARALLEL",
    "BATCH_SIZE": "MAX_BATCH_SIZE and MAX_BATCH_TOKENS bound a step",
    "MODEL_SHARED_FOLDER": "CHECKPOINT_FOLDER alone names the checkpoint",
    "LOCAL_SSD": "files are read where they are",
    "CHECKPOINT_LOCAL": "files are read where they are",
    "LAUNCH_ARGS": "flags and the constants above it decide",
    "INFERENCE_ARG_OVERRIDES": "the model is configured from its checkpoint",
}


def _path(v: Any) -> Path:
    if not isinstance(v, (str, os.PathLike)) or not str(v):
        raise TypeError("a path")
    return Path(v).expanduser()


def _int(low: int, high: int) -> Callable[[Any], int]:
    def check(v: Any) -> int:
        if isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high:
            raise TypeError(f"a whole number from {low} to {high}")
        return v

    return check


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(v: Any) -> str:
        if v not in choices:
            raise TypeError(f"one of {', '.join(choices)}")
        return str(v)

    return check


def _bool(v: Any) -> bool:
    if not isinstance(v, bool):
        raise TypeError("True or False")
    return v


def _text(v: Any) -> str:
    if not isinstance(v, str) or not v:
        raise TypeError("a non-empty string")
    return v


def _seconds(low: int) -> Callable[[Any], float]:
    def check(v: Any) -> float:
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not low <= v <= 86400:
            raise TypeError(f"seconds from {low} to 86400")
        return float(v)

    return check


def _origins(v: Any) -> str:
    origin = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,*?#@]+")
    if not isinstance(v, str) or not v or not all(origin.fullmatch(o.strip()) for o in v.split(",")):
        raise TypeError("origins such as https://example.org,http://localhost:3000, without a path, or *")
    return v


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "checkpoint": _path,
    "bpe_vocab": _path,
    "bpe_merges": _path,
    "chat_template": _path,
    "host": _text,
    "port": _int(0, 65535),
    "model_parallel": _int(1, 1024),
    "dtype": _one_of(*DTYPES),
    "device": _one_of("cpu", "cuda"),
    "max_seq_len": _int(2, 1 << 20),
    "max_batch_tokens": _int(1, 1 << 20),
    "max_batch_size": _int(1, 1 << 16),
    "max_beam": _int(1, 128),
    "block_size": _int(1, 1024),
    "cache_tokens": _int(1, 1 << 40),
    "prefix_cache": _bool,
    "cuda_graphs": _bool,
    "run_ahead": _bool,
    "cache_size": _int(0, 1 << 20),
    "cache_list_size": _int(0, 1 << 10),
    "max_queue": _int(1, 1 << 20),
    "threads": _int(1, 1024),
    "timeout_s": _seconds(1),
    "grace_s": _seconds(0),
    "interface": _text,
    "metaseq_compat": _bool,
    "keys_file": _path,
    "api_key_file": _path,
    "api_key": _text,
    "no_keys": _bool,
    "guard_metrics": _bool,
    "cors_origins": _origins,
    "request_timeout_s": _seconds(1),
    "registry": _path,
    "service": _text,
    "member": _int(0, 1 << 16),
    "successor": _int(1, 1 << 15),
}


def find_constants(flag: str | None, cwd: Path) -> Path | None:
    """The constants file: the flag, else $METASEQ_API_CONSTANTS, else ./constants.py, else None.

    Raises: SettingsError where a file was named and is not there.
    """
    for how, named in (("--constants", flag), (f"${ENV_CONSTANTS}", os.environ.get(ENV_CONSTANTS))):
        if named:
            path = Path(named).expanduser()
            if not path.is_file():
                raise SettingsError(f"{how} names {named}, which is not a file")
            return path
    path = cwd / "constants.py"
    return path if path.is_file() else None


def read_constants(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Run the operator's file once: (settings by field, remarks to log).

    Source: metaseq/service/constants.py. Only upper-case names count; None leaves a setting undecided.
    Raises: SettingsError naming the file and the name at fault.
    """
    try:
        found = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:  # an operator's own Python file may raise anything; it becomes one line
        raise SettingsError(
            f"{path}: {type(e).__name__}: {e}; it must be Python of lines such as DEFAULT_PORT = 6010"
        ) from e
    values: dict[str, Any] = {}
    remarks: list[str] = []
    for name, value in found.items():
        if not name.isupper() or name.startswith("_"):
            continue
        if name in _RETIRED:
            if value is not None and name != "TOTAL_WORLD_SIZE":
                remarks.append(f"{path}: {name} has no effect here: {_RETIRED[name]}")
        elif name not in _NAMES:
            near = difflib.get_close_matches(name, [*_NAMES, *_RETIRED], n=1)
            raise SettingsError(f"{path}: unknown name {name}" + (f"; did you mean {near[0]}?" if near else ""))
        elif value is not None and not (name == "MODEL_FILE" and found.get("CHECKPOINT_FOLDER")):
            values[_NAMES[name]] = _checked(_NAMES[name], value, f"{path}: {name}")
    world, parallel = found.get("TOTAL_WORLD_SIZE"), found.get("MODEL_PARALLEL")
    if world is not None:
        world = _checked("model_parallel", world, f"{path}: TOTAL_WORLD_SIZE")
        if parallel is not None and world != parallel:
            raise SettingsError(
                f"{path}: TOTAL_WORLD_SIZE is {world} but MODEL_PARALLEL is {parallel}; one service is one model, "
                "so set both alike and start a second service for more"
            )
        values.setdefault("model_parallel", world)
    return values, remarks


def _checked(field: str, value: Any, where: str) -> Any:
    try:
        return _CHECKS[field](value)
    except TypeError as e:
        raise SettingsError(f"{where} is {value!r}; it must be {e}") from None


def given(values: Mapping[str, Any]) -> Settings:
    """Settings from a caller's own words (by field name; None means not given), and from no file.

    Raises: SettingsError.
    """
    chosen = {field: _checked(field, value, field) for field, value in values.items() if value is not None}
    return Settings(**chosen, demo="checkpoint" not in chosen)


def api_key() -> str | None:
    """The key that this user's clients show to a server: $METASEQ_API_KEY."""
    return os.environ.get(ENV_API_KEY) or None


def load(
    flags: Mapping[str, Any], *, constants: str | None = None, cwd: Path | None = None
) -> tuple[Settings, list[str]]:
    """Settings from flags (by field name; None means not given) and the constants file, and remarks to log.

    Raises: SettingsError.
    """
    remarks: list[str] = []
    values: dict[str, Any] = {}
    if path := find_constants(constants, cwd or Path.cwd()):
        values, remarks = read_constants(path)
    for field, value in flags.items():
        if value is not None:
            values[field] = _checked(field, value, _FLAGS.get(field, f"--{field.replace('_', '-')}"))
    values["api_key"] = api_key()
    values["demo"] = "checkpoint" not in values
    chosen = dataclasses.replace(Settings(), **values)
    if chosen.cache_list_size and not chosen.cache_size:
        raise SettingsError(
            f"CACHE_LIST_SIZE (--cache-list-size) is {chosen.cache_list_size}, but no answers are kept at all; "
            "set CACHE_SIZE (--cache-size) too"
        )
    return chosen, remarks
