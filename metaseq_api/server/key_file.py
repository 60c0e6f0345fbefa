"""API keys as they lie on disk: one JSON object a line, a salted hash and never the key.

    {"name": "alice", "salt": "...", "hash": "...", "weight": 10.0, "requests_per_minute": 60, "expires": "..."}

A key is 256 random bits, so nobody can try them all against its hash: one round of BLAKE2b is enough, where a password,
which a person chose, would need scrypt. The salt keeps two files with the same key from showing it.

Knows the format, the rights such a file must have, and how it is replaced without a moment in which it is half there.
Does not know requests or limits; `keys` looks keys up, `quota` counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metaseq_api.errors import SettingsError

PREFIX = "msk-"
MIN_KEY_LEN, MAX_KEY_LEN = 16, 256
"""Of a key somebody else made up (METASEQ_API_KEY, --api-key-file). A longer one given is not hashed to its end."""
MAX_WEIGHT = 1e6
MAX_LIMIT = 10**12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_GIVEN = re.compile(r"[!-~]+")
_MAKE = "metaseq-api-keys --keys {} add NAME"
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")
_FIELDS = frozenset({"name", "salt", "hash", "weight", "expires", *_LIMITS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One client's key without the key: whose it is, what it may use. None means no limit."""

    name: str
    salt: bytes = field(repr=False)
    hash: bytes = field(repr=False)
    weight: float = 1.0
    """Its share beside other keys, where there is not enough for all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and completions."""
    concurrency: int | None = None
    """Requests in work at once."""
    expires: float | None = None
    """Units: seconds of the Unix clock."""

    def matches(self, given: bytes) -> bool:
        """Whether this is the key; takes as long whatever is given."""
        return hmac.compare_digest(_hash(given, self.salt), self.hash)

    def to_line(self) -> str:
        fields: dict[str, Any] = {"name": self.name, "salt": self.salt.hex(), "hash": self.hash.hex()}
        fields["weight"] = self.weight
        fields |= {name: getattr(self, name) for name in _LIMITS if getattr(self, name) is not None}
        if self.expires is not None:
            fields["expires"] = datetime.fromtimestamp(self.expires, timezone.utc).isoformat(timespec="seconds")
        return json.dumps(fields)


def new_secret() -> str:
    """A key nobody can guess."""
    return PREFIX + secrets.token_urlsafe(32)


def make_key(name: str, secret: str, **limits: Any) -> Key:
    """The Key that `secret` opens. Raises: SettingsError naming the limit that cannot be."""
    salt = secrets.token_bytes(16)
    return _checked({"name": name, "salt": salt, "hash": _hash(secret.encode(), salt), **limits}, f"key {name!r}")


def check_secret(secret: str, where: str) -> str:
    """A key that somebody else made up, if it will do. Raises: SettingsError, which does not show it."""
    secret = secret.strip()
    if not MIN_KEY_LEN <= len(secret) <= MAX_KEY_LEN or not _GIVEN.fullmatch(secret):
        raise SettingsError(
            f"{where} holds no usable key; it must be one of {MIN_KEY_LEN} to {MAX_KEY_LEN} printable ASCII characters "
            "without spaces, such as: openssl rand -hex 32"
        )
    return secret


def read_keys(path: Path) -> tuple[tuple[Key, ...], os.stat_result, bool]:
    """All keys of a file, its stat, and whether strangers may read it.

    Raises: SettingsError where it is not there, could be changed by others, or holds anything but keys.
    """
    text, found = _read(path, forbidden=stat.S_IWGRP | stat.S_IWOTH, remedy="chmod 600")
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            key = _parse(line, f"{path}, line {number}")
            if key.name in keys:
                raise SettingsError(f"{path}, line {number}: a second key is named {key.name!r}; rename or remove one")
            keys[key.name] = key
    return tuple(keys.values()), found, bool(found.st_mode & stat.S_IROTH)


def change_keys(path: Path, change: Callable[[tuple[Key, ...]], Sequence[Key]]) -> None:
    """Replace a file's keys by what `change` makes of them, made where it is missing; readers see the old or the new.

    Comments are not kept. Raises: SettingsError.
    """
    with _locked(path.parent):
        old = read_keys(path)[0] if path.exists() else ()
        _write(path, "".join(key.to_line() + "\n" for key in change(old)))


def read_secret(path: Path) -> str:
    """The one key that a file of its own holds, as it is. Raises: SettingsError where others could read it too."""
    text, _ = _read(path, forbidden=0o077, remedy="chmod 600")
    return check_secret(text, str(path))


def write_secret(path: Path, secret: str) -> None:
    """Keep a key in a file that only this user reads. Raises: SettingsError where the file is there already."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secret + "\n")
    except OSError as e:
        raise SettingsError(f"{path} cannot be written ({e.strerror}); name another file") from None


def _hash(secret: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=32, salt=salt).digest()


def _read(path: Path, *, forbidden: int, remedy: str) -> tuple[str, os.stat_result]:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            raw = file.read() if stat.S_ISREG(found.st_mode) else None
    except OSError as e:
        raise SettingsError(f"{path} cannot be read ({e.strerror}); make it with {_MAKE.format(path)}") from None
    if raw is None:
        raise SettingsError(f"{path} is not a file; name a file of keys")
    if found.st_mode & forbidden or found.st_uid not in (0, os.geteuid()):
        what = f"has the rights {stat.filemode(found.st_mode)} and belongs to user {found.st_uid}"
        raise SettingsError(f"{path} {what}, so that others could use or change keys; {remedy} {path}")
    try:
        return raw.decode(), found
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text; make it with {_MAKE.format(path)}") from None


def _parse(line: str, where: str) -> Key:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError
        entry["salt"], entry["hash"] = bytes.fromhex(entry["salt"]), bytes.fromhex(entry["hash"])
        if not 8 <= len(entry["salt"]) <= 16 or len(entry["hash"]) != 32:
            raise ValueError
        if entry.get("expires") is not None:
            entry["expires"] = read_date(entry["expires"], where)
    except (ValueError, KeyError, TypeError, RecursionError):  # the line may hold a key by mistake: it is not shown
        raise SettingsError(f"{where} is not a key; write keys with metaseq-api-keys add NAME") from None
    if unknown := sorted(entry.keys() - _FIELDS):
        raise SettingsError(f"{where}: unknown field {unknown[0][:40]!r}; there are {', '.join(sorted(_FIELDS))}")
    return _checked({name: value for name, value in entry.items() if value is not None}, where)


def read_date(text: Any, where: str) -> float:
    """A day or a moment, UTC where it says no zone. Units: seconds of the Unix clock. Raises: SettingsError."""
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        raise SettingsError(
            f"{where}: expires must be a date such as 2030-01-31 or 2030-01-31T12:00:00+00:00"
        ) from None


def _checked(fields: dict[str, Any], where: str) -> Key:
    name, weight = fields.get("name"), fields.get("weight", 1.0)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(f"{where}: a name is 1 to 64 letters, digits and . _ @ -, and begins with one of the first")
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or not 0 < weight <= MAX_WEIGHT:
        raise SettingsError(f"{where}: weight is {weight!r}; it must be a number above 0, at most {MAX_WEIGHT:.0f}")
    for limit in _LIMITS:
        value = fields.get(limit)
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_LIMIT):
            raise SettingsError(f"{where}: {limit} is {value!r}; it must be a whole number from 1, or left out")
    return Key(**{**fields, "weight": float(weight)})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers out; readers need no lock. Some shared file systems cannot lock a folder: then it goes on."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise SettingsError(f"{folder} cannot be opened ({e.strerror}); make the folder first") from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    path = path.resolve()  # a link stays a link
    try:
        fd, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    except OSError as e:
        raise SettingsError(f"{path} cannot be written ({e.strerror}); name a file in a folder of yours") from None
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        os.unlink(part)
        raise SettingsError(f"{path} cannot be written ({e.strerror}); the old keys are still there") from None
