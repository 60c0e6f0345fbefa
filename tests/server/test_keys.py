"""Keys on disk, how they are found, and when a service asks for one."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from metaseq_api.errors import SettingsError
from metaseq_api.server import key_file, keys
from metaseq_api.server.key_file import Key, change_keys, make_key, new_secret, read_keys, read_secret, write_secret
from metaseq_api.server.keys import CHECK_S, Keyring, curl_header, open_keyring, secure
from metaseq_api.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def keep(path: Path, *some: Key) -> None:
    change_keys(path, lambda _: some)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def test_a_key_comes_back_from_disk_as_it_was_and_its_file_does_not_hold_it(path: Path) -> None:
    secret = new_secret()
    limits = {"requests_per_minute": 60, "tokens_per_minute": 10**6, "concurrency": 4}
    key = make_key("alice", secret, weight=2.5, expires=1900000000.0, **limits)
    keep(path, key)
    assert read_keys(path)[0] == (key,)
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_two_keys_are_alike_and_none_can_be_guessed() -> None:
    some = {new_secret() for _ in range(100)}
    assert len(some) == 100
    assert all(len(s) >= 47 and s.startswith("msk-") for s in some)
    assert make_key("a", "x" * 20).hash != make_key("a", "x" * 20).hash, "salted"


def test_neither_a_key_nor_its_hash_is_shown(path: Path) -> None:
    key = make_key("alice", new_secret())
    assert key.hash.hex() not in repr(key)
    assert repr(key.hash) not in repr(key)
    assert "secret" not in repr(Settings(api_key="a-secret-of-mine-000"))


def test_every_key_is_compared_whichever_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [new_secret() for _ in range(5)]
    keep(path, *(make_key(f"k{i}", s) for i, s in enumerate(secrets)))
    ring = Keyring(path)
    compared = []
    real = key_file.hmac.compare_digest
    monkeypatch.setattr(key_file.hmac, "compare_digest", lambda a, b: bool(compared.append(len(a))) or real(a, b))
    for given in (secrets[0], secrets[4], "no key", "", "é" * 30, secrets[0] + "x"):
        compared.clear()
        ring.find(given)
        assert compared == [32] * 5
    assert ring.find(secrets[3]).name == "k3"  # type: ignore[union-attr]
    assert ring.find("\ud800") is None


def test_a_changed_file_counts_without_a_restart_and_is_looked_at_once_a_second(path: Path) -> None:
    old, new, tick = new_secret(), new_secret(), Clock()
    keep(path, make_key("alice", old))
    ring = Keyring(path, tick=tick)
    keep(path, make_key("bob", new))
    assert ring.find(old) is not None
    tick.now += CHECK_S
    assert ring.find(old) is None
    found = ring.find(new)
    assert found is not None
    assert found.name == "bob"
    keep(path)
    tick.now += CHECK_S
    assert ring.find(new) is None, "the last key can be taken away too"


@pytest.mark.parametrize("broken", ["nonsense", "deleted", "writable"])
def test_a_broken_new_file_keeps_the_old_keys_and_says_so_once(
    broken: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret, tick = new_secret(), Clock()
    keep(path, make_key("alice", secret))
    ring = Keyring(path, tick=tick)
    if broken == "nonsense":
        path.write_text(f'{{"name": "{new_secret()}"')
    elif broken == "deleted":
        path.unlink()
    else:
        path.chmod(0o666)
    for _ in range(3):
        tick.now += CHECK_S
        assert ring.find(secret) is not None
    (line,) = caplog.messages
    assert line.startswith("the old keys stay in force: ")
    assert "msk-" not in line
    keep(path.with_name("next"), make_key("bob", secret))
    os.replace(path.with_name("next"), path)
    tick.now += CHECK_S
    assert ring.find(secret).name == "bob"  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_change_is_refused(mode: int, path: Path) -> None:
    keep(path, make_key("alice", new_secret()))
    path.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        Keyring(path)


def test_a_file_that_everybody_reads_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep(path, make_key("alice", new_secret()))
    path.chmod(0o644)
    Keyring(path)
    assert "readable by everybody" in caplog.text


GOOD = make_key("alice", "x" * 20).to_line()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("msk-abcdef", "line 1 is not a key"),
        ("[1]", "line 1 is not a key"),
        ('{"name": "a"}', "line 1 is not a key"),
        ('{"name": "a", "salt": "00", "hash": "00"}', "line 1 is not a key"),
        (GOOD + "\n" + GOOD, "line 2: a second key is named 'alice'"),
        ("# mine\n\n" + GOOD.replace("weight", "wait"), "line 3: unknown field 'wait'"),
        (GOOD.replace("1.0", "0"), "weight is 0"),
        (GOOD.replace("1.0", "NaN"), "weight is nan"),
        (GOOD.replace("1.0", '"1"'), "weight is '1'"),
        (GOOD.replace("1.0", '1, "concurrency": true'), "concurrency is True"),
        (GOOD.replace("1.0", '1, "tokens_per_minute": 0'), "tokens_per_minute is 0"),
        (GOOD.replace("1.0", '1, "expires": "soon"'), "expires must be a date such as 2030-01-31"),
        (GOOD.replace("alice", "al\\u0000ice"), "a name is 1 to 64 letters"),
    ],
)
def test_what_is_not_a_key_is_refused_with_its_line_and_not_shown(text: str, says: str, path: Path) -> None:
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(SettingsError) as caught:
        read_keys(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "abcdef" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"metaseq-api-keys --keys .*nowhere add NAME"):
        Keyring(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="cannot be read"):
        Keyring(tmp_path)


def test_many_who_add_at_once_lose_no_key(path: Path) -> None:
    def add(name: str) -> None:
        change_keys(path, lambda old: [*old, make_key(name, new_secret())])

    threads = [threading.Thread(target=add, args=(f"k{i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k.name for k in read_keys(path)[0]} == {f"k{i}" for i in range(20)}


def test_an_expired_key_is_told_apart_by_the_clock(path: Path) -> None:
    secret, clock = new_secret(), Clock()
    keep(path, make_key("alice", secret, expires=1500.0))
    ring = Keyring(path, clock=clock)
    key = ring.find(secret)
    assert key is not None
    assert not ring.has_expired(key)
    clock.now = 1500.0
    assert ring.has_expired(key)


def test_what_a_guess_costs_does_not_grow_with_its_length(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(path, make_key("alice", new_secret()))
    ring = Keyring(path)
    hashed: list[int] = []
    real = key_file._hash
    monkeypatch.setattr(key_file, "_hash", lambda given, salt: hashed.append(len(given)) or real(given, salt))
    assert ring.find("x" * 60000) is None
    assert hashed == [key_file.MAX_KEY_LEN + 1]


def test_the_curl_to_paste_says_where_the_key_goes_and_not_the_key(tmp_path: Path) -> None:
    assert curl_header(Settings()) == ""
    assert curl_header(Settings(keys_file=tmp_path / "k")) == " -H 'Authorization: Bearer KEY'"
    assert "secret" not in curl_header(Settings(api_key="a-secret-of-mine-000"))
    assert "$(cat" in curl_header(Settings(api_key_file=tmp_path / "my key"))
    assert f"'{tmp_path}/my key'" in curl_header(Settings(api_key_file=tmp_path / "my key"))


# which service asks for a key


def test_a_service_for_this_machine_alone_asks_for_no_key() -> None:
    for address in ("127.0.0.1", "::1", "127.8.8.8", "::ffff:127.0.0.1"):
        assert secure(Settings(), address) == (Settings(), None)
    assert open_keyring(Settings()) is None


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.1.2.3", "fe80::1%eth0"])
def test_beyond_it_a_key_is_made_and_told_once(address: str) -> None:
    chosen, told = secure(Settings(), address)
    assert chosen.api_key
    assert told is not None
    assert told.count(chosen.api_key) == 1
    ring = open_keyring(chosen)
    assert ring is not None
    assert ring.find(chosen.api_key) is not None
    assert ring.find(chosen.api_key[:-1]) is None


def test_whoever_wants_none_must_say_so_and_is_warned() -> None:
    chosen, told = secure(Settings(no_keys=True), "0.0.0.0")
    assert open_keyring(chosen) is None
    assert told is not None
    assert "anybody" in told
    with pytest.raises(SettingsError, match="leave one of the two out"):
        secure(Settings(no_keys=True, api_key="x" * 20), "0.0.0.0")


def test_the_file_of_the_one_key_is_made_where_it_is_missing_and_kept_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "key"
    chosen, told = secure(Settings(api_key_file=path), "0.0.0.0")
    secret = read_secret(path)
    assert told == f"a new API key is in {path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert chosen.api_key is None
    assert secure(chosen, "0.0.0.0") == (chosen, None)
    assert open_keyring(chosen).find(secret).name == keys.SINGLE  # type: ignore[union-attr]
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        secure(chosen, "0.0.0.0")
    with pytest.raises(SettingsError, match="name another file"):
        write_secret(path, secret)


@pytest.mark.parametrize("weak", ["short", "fifteen letters", "with a space in between", "é" * 20])
def test_a_key_that_could_be_guessed_is_refused_and_not_shown(weak: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SettingsError, match="METASEQ_API_KEY") as caught:
        secure(Settings(api_key=weak), "127.0.0.1")
    assert weak not in str(caught.value)


def test_an_empty_file_lets_nobody_in_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    keep(path)
    assert Keyring(path).find("") is None
    assert "nobody is let in" in caplog.text
