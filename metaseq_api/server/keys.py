"""Whose key is it: looks a given key up among those of a service, and follows its file as that changes.

Knows the keys of one service. Does not know HTTP, or how a key lies on disk; `key_file` does. No key is ever logged,
shown in an error, or kept: only hashes are.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

from metaseq_api.errors import SettingsError
from metaseq_api.server.key_file import (
    MAX_KEY_LEN,
    Key,
    check_secret,
    make_key,
    new_secret,
    read_keys,
    read_secret,
    write_secret,
)
from metaseq_api.settings import ENV_API_KEY, Settings

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""Units: seconds between looks at whether the file has changed."""
SINGLE = "api-key"
"""The name of the one key that no file of keys holds."""


class Keyring:
    """The keys of one service; `find` may be called from any thread.

    A new file that cannot be used leaves the old keys in force, and one line in the log.
    Raises: SettingsError where the file cannot be used at the start.
    """

    def __init__(
        self,
        path: Path | None,
        single: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock, self._tick = path, clock, tick
        self._single = () if single is None else (make_key(SINGLE, single),)
        self._keys: tuple[Key, ...] = ()
        self._seen: tuple[int, ...] | None = None
        self._looked = tick()
        self._lock = threading.Lock()
        if path is not None:
            self._seen = self._stamp()
            self._load()
            if not self._keys and not self._single:
                log.warning("%s holds no key yet, so nobody is let in; metaseq-api-keys add NAME", path)

    def find(self, given: str) -> Key | None:
        """The Key that `given` is, expired ones included. Every key is compared, so that time tells nothing."""
        self._follow()
        secret = given[: MAX_KEY_LEN + 1].encode("utf-8", "surrogatepass")
        found = None
        for key in (*self._single, *self._keys):
            if key.matches(secret):
                found = key
        return found

    def has_expired(self, key: Key) -> bool:
        return key.expires is not None and self._clock() >= key.expires

    def _follow(self) -> None:
        """Read the file again where it is another than the one last read."""
        if self._path is None or self._tick() - self._looked < CHECK_S or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = self._tick()
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp  # also where it is no good: that is said once
                self._load()
                log.info("%s: %d keys", self._path, len(self._keys))
        except SettingsError as e:
            log.error("the old keys stay in force: %s", e)
        finally:
            self._lock.release()

    def _stamp(self) -> tuple[int, ...] | None:
        assert self._path is not None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode, found.st_uid

    def _load(self) -> None:
        assert self._path is not None
        self._keys, _, readable = read_keys(self._path)
        if readable:
            log.warning("%s is readable by everybody; it holds only hashes, but chmod 600 it", self._path)


def open_keyring(settings: Settings) -> Keyring | None:
    """The keys a service asks for, or None where it asks for none. Raises: SettingsError."""
    single = settings.api_key
    if single is not None:
        single = check_secret(single, f"${ENV_API_KEY}")
    elif settings.api_key_file is not None:
        single = read_secret(settings.api_key_file)
    if single is None and settings.keys_file is None:
        return None
    if settings.no_keys:
        raise SettingsError("--no-keys (NO_KEYS) asks for none, but keys are given; leave one of the two out")
    return Keyring(settings.keys_file, single)


def secure(settings: Settings, address: str) -> tuple[Settings, str | None]:
    """Settings under which a service that others reach asks for a key, and what to tell the user, once.

    address: the one listened on. An --api-key-file that is not there yet gets a new key; where no key is given at all,
    one is made for this run. Raises: SettingsError where what is given cannot be used.
    """
    path = settings.api_key_file
    if path is not None and settings.api_key is None and not path.exists():
        write_secret(path, new_secret())
        open_keyring(settings)
        return settings, f"a new API key is in {path}"
    if open_keyring(settings) is not None or is_loopback(address):
        return settings, None
    if settings.no_keys:
        return settings, f"anybody who reaches {address} may use this service: it asks for no key (--no-keys)"
    key = new_secret()
    told = (
        f"listening on {address} without a key given, so one was made for this run, shown this once: {key}\n"
        "send it as `Authorization: Bearer KEY`; to keep keys: --keys FILE (metaseq-api-keys) or --api-key-file FILE"
    )
    return dataclasses.replace(settings, api_key=key), told


def curl_header(settings: Settings) -> str:
    """What a curl to this service needs beside the rest, for a person to paste; the key itself is not in it."""
    if settings.api_key is None and settings.api_key_file is not None:
        return f' -H "Authorization: Bearer $(cat {shlex.quote(str(settings.api_key_file.resolve()))})"'
    asks = settings.api_key is not None or settings.keys_file is not None
    return " -H 'Authorization: Bearer KEY'" if asks else ""


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
