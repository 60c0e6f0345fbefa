"""Services in shared storage, where any login shell finds them: who was submitted, and what it says of itself.

    DIR/NAME/job.json         what was submitted: written once, by `submit`
    DIR/NAME/next-1.json      the job that is to be member 1 after another one: by the member that submitted it
    DIR/NAME/script           the batch script, where members submit their successors
    DIR/NAME/member-0.json    what rank 0 of a member says of itself, again and again (recorder.py)
    DIR/NAME/proxy.json       what the proxy in front of the members says of itself
    DIR/NAME/key              the key that clients must send; nobody else may read it, and no other file holds it
    DIR/logs/NAME-JOB.log     what the job wrote; stays when the service is forgotten

Each file has one writer and is replaced as a whole (write, fsync, rename), so that a reader sees the old one or the new
one. A reader takes what it knows of a file and leaves what a newer version added. Does not know SLURM or the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from metaseq_api.errors import ServiceError, SettingsError

FORMAT = 1
CLAIM_S = 120.0
"""Units: seconds for which a folder without job.json is taken for one that is being submitted."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What was submitted under a name. Units: submitted in seconds since 1970."""

    name: str
    job: str
    model: str
    submitted: float
    login: str = ""
    """The machine it was submitted from."""
    key_file: str | None = None
    log: str = ""
    """Where the job's output goes; of a job array, %a stands for the member."""
    replicas: int = 0
    """Members that a job array starts; 0 for a job that is none."""
    member: int = 0
    """Of a successor: which member it is; `job` is that one element of its array then."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one member of a service last said of itself. Units: seconds since 1970; rate in bytes a second."""

    name: str
    state: str
    """starting, loading, ready, draining or ended."""
    heartbeat: float
    started: float = 0.0
    member: int = 0
    job: str | None = None
    model: str = ""
    node: str = ""
    host: str = ""
    port: int = 0
    url: str = ""
    percent: float = 0.0
    rate: float = 0.0
    at_once: int = 0
    """Requests that it works on at once; 0 where it does not say."""
    reason: str = ""
    exit_code: int | None = None
    format: int = FORMAT


_T = TypeVar("_T", Submission, Record)


class Registry:
    """The folder of services."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Make the folder where it is missing. Raises: SettingsError where it cannot be used, or others may write."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
            stat = self.folder.stat()
        except OSError as e:
            raise SettingsError(
                f"the registry {self.folder} cannot be made ({e.strerror}); name a folder that the compute nodes see "
                "too with --registry or METASEQ_API_REGISTRY"
            ) from None
        if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
            raise SettingsError(
                f"others may write in the registry {self.folder}, and so send your clients elsewhere; chmod 700 it, or "
                "name a folder of your own with --registry"
            )

    def path(self, name: str) -> Path:
        """A service's folder. Raises: SettingsError for a name that cannot be one."""
        if not _NAME.fullmatch(name) or name == "logs":
            raise SettingsError(
                f"{name!r} cannot be a service's name; give --name up to 63 letters, digits, '.', '_' and '-'"
            )
        return self.folder / name

    def key_file(self, name: str) -> Path:
        return self.path(name) / "key"

    def log_file(self, name: str, job: str) -> Path:
        """A job's output; `job` may be sbatch's %j."""
        return self.folder / "logs" / f"{name}-{job}.log"

    def member_file(self, name: str, member: int) -> Path:
        return self.path(name) / f"member-{member}.json"

    def proxy_file(self, name: str) -> Path:
        return self.path(name) / "proxy.json"

    def script_file(self, name: str) -> Path:
        return self.path(name) / "script"

    def names(self) -> list[str]:
        """Every service there is, in order."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(
                p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.name != "logs" and p.is_dir()
            )
        return []

    def claim(self, name: str) -> Path:
        """Take a name, once and for one submitter; the service's folder. Raises: ServiceError where it is taken."""
        path = self.path(name)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise ServiceError(
                f"there is a service {name} already; `metaseq-api-slurm stop {name}` ends it, or choose another --name"
            ) from None
        return path

    def is_claimed(self, name: str, now: float) -> bool:
        """Whether somebody is submitting a service of this name at this moment."""
        with contextlib.suppress(FileNotFoundError):
            path = self.path(name)
            return not (path / "job.json").exists() and now - path.stat().st_mtime < CLAIM_S
        return False

    def forget(self, name: str) -> None:
        """Remove all of a service but its log. The name is free at once, and one caller alone removes it."""
        path = self.path(name)
        away = self.folder / f".{name}.{os.getpid()}.{time.monotonic_ns()}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(away)
            shutil.rmtree(away, ignore_errors=True)

    def write_submission(self, submission: Submission) -> None:
        replace_json(self.path(submission.name) / "job.json", dataclasses.asdict(submission))

    def write_successor(self, submission: Submission) -> None:
        replace_json(self.path(submission.name) / f"next-{submission.member}.json", dataclasses.asdict(submission))

    def submission(self, name: str) -> Submission | None:
        """What was submitted under this name; None where nothing was, or it cannot be read."""
        return _read(self.path(name) / "job.json", Submission)

    def successors(self, name: str) -> list[Submission]:
        """The jobs that members submitted to take over from them, one at most for each member."""
        found = (_read(path, Submission) for path in self.path(name).glob("next-*.json"))
        return [s for s in found if s is not None]

    def proxy(self, name: str) -> Record | None:
        """What the proxy of a service says of itself; None where there never was one."""
        return _read(self.proxy_file(name), Record)

    def records(self, name: str) -> list[Record]:
        """What the members of a service say of themselves, in order."""
        found = (_read(path, Record) for path in self.path(name).glob("member-*.json"))
        return sorted((r for r in found if r is not None), key=lambda r: r.member)


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file as a whole. Raises: OSError, the old file then being as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user may read, and that was not there. Raises: OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def read_key(path: Path) -> str:
    """The one key that a file holds. Raises: SettingsError."""
    try:
        return checked_key(path.read_text("utf-8").strip(), str(path))
    except (OSError, ValueError) as e:
        raise SettingsError(f"the key file {path} cannot be read ({e}); name a file that holds one key") from None


def checked_key(key: str, where: str) -> str:
    """The key, if HTTP can carry it. Raises: SettingsError, the key itself not being in it."""
    if not key.isascii() or not key.isprintable() or " " in key or not 16 <= len(key) <= 256:  # as the server has it
        raise SettingsError(
            f"{where} holds no usable key: it must be one of 16 to 256 printable ASCII characters without blanks"
        )
    return key


def _read(path: Path, kind: type[_T]) -> _T | None:
    """What is known here of a file's fields, each of the right type; None where it is not there or not whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    values = {f.name: found[f.name] for f in dataclasses.fields(kind) if f.name in found}
    try:
        whole = kind(**values)
    except TypeError:  # a field is missing that always was there
        return None
    good = all(_fits(values[f.name], str(f.type)) for f in dataclasses.fields(kind) if f.name in values)
    return whole if good else None


def _fits(value: Any, annotation: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "None": (type(None),)}
    return isinstance(value, tuple(k for name in annotation.split(" | ") for k in kinds[name]))
