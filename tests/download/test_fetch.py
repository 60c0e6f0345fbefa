"""One file over a line that breaks, stalls and lies: the bytes are right, or there is no file of that name."""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import file_server as bad
from support.file_server import Fault, FileServer, pt_file

from metaseq_api.download import fetch as fetch_module
from metaseq_api.download.catalogue import File
from metaseq_api.download.fetch import Patience, arrived, fetch, kept
from metaseq_api.download.web import Web
from metaseq_api.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    MetaseqApiError,
    ResourceError,
    TokenizerError,
)

CONTENT = pt_file(300_000)
OTHER = pt_file(300_000, seed=1)
assert len(CONTENT) == len(OTHER)
PATH = "/opt/model.pt"


class Fetching:
    """A fetch of one file, which waits for nothing: `waits` are the pauses it would have made."""

    def __init__(self, server: FileServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.waits: list[float] = []
        self.progress: list[int] = []
        server.files[PATH] = CONTENT

    def file(self, weights: int = 290_000, md5: str | None = None, query: str = "") -> File:
        return File("model.pt", f"{self.server.url}{PATH}{query}", weights, md5)

    def __call__(self, *faults: Fault | None, file: File | None = None, tries: int = 4, timeout_s: float = 10) -> Path:
        self.server.faults[PATH] = list(faults)
        return fetch(
            file or self.file(),
            self.folder,
            Web(timeout_s, now=lambda: 1_000_000_000.0),
            patience=Patience(tries=tries),
            pause=self.waits.append,
            progress=self.progress.append,
        )

    def refused(self, error: type[MetaseqApiError], match: str, *faults: Fault | None, **kwargs: object) -> None:
        with pytest.raises(error, match=match) as refusal:
            self(*faults, **kwargs)  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)
        assert not (self.folder / "model.pt").exists()

    @property
    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir())

    @property
    def ranges(self) -> list[str | None]:
        return self.server.ranges(PATH)


@pytest.fixture
def fetching(server: FileServer, tmp_path: Path) -> Fetching:
    return Fetching(server, tmp_path)


def test_a_file_comes_whole_and_leaves_nothing_else(fetching: Fetching) -> None:
    assert fetching().read_bytes() == CONTENT
    assert fetching.names == ["model.pt"]
    assert fetching.ranges == [None]
    assert fetching.waits == []
    assert sum(fetching.progress) == len(CONTENT)


@pytest.mark.parametrize("validators", [bad.etag, bad.modified])
@pytest.mark.parametrize("breaks", [bad.breaks_off, bad.resets], ids=["closed", "reset"])
def test_a_broken_transfer_goes_on_where_it_broke(
    fetching: Fetching, breaks: Callable[[int], Fault], validators: Callable[[bytes], dict[str, str]]
) -> None:
    fetching.server.validators = validators
    assert fetching(breaks(100_000), breaks(50_000)).read_bytes() == CONTENT
    starts = [int((r or "bytes=0-").removeprefix("bytes=").removesuffix("-")) for r in fetching.ranges]
    assert len(starts) == 3
    assert starts == sorted(starts)
    if breaks is bad.breaks_off:  # a reset may swallow what was on its way
        assert starts == [0, 100_000, 150_000]
    assert sum(fetching.progress) == len(CONTENT)
    assert fetching.names == ["model.pt"]


def test_a_stall_counts_as_broken(fetching: Fetching) -> None:
    assert fetching(bad.stalls(100_000), timeout_s=1.0).read_bytes() == CONTENT
    assert fetching.ranges == [None, "bytes=100000-"]


def test_a_server_that_never_answers_ends_in_one_line(fetching: Fetching) -> None:
    def silent(handler: bad.Handler, content: bytes) -> None:
        handler.server.closing.wait(30)

    fetching.refused(
        ResourceError,
        r"^127.0.0.1:\d+/opt/model.pt: nothing arrived for too long, 2 times in a row; .*run the same command again",
        silent,
        silent,
        tries=2,
        timeout_s=0.1,
    )
    assert fetching.names == []


def test_a_slow_server_is_borne(fetching: Fetching) -> None:
    assert fetching(bad.dribbles(7001), timeout_s=2).read_bytes() == CONTENT
    assert fetching.waits == []


def test_another_run_goes_on_where_the_last_one_ended(fetching: Fetching) -> None:
    fetching.refused(ResourceError, "closed early", bad.breaks_off(120_000), *[bad.breaks_off(0)] * 4)
    assert fetching.names == ["model.pt.part", "model.pt.part.json"]
    assert arrived(fetching.file(), fetching.folder) == 120_000
    fetching.server.asked.clear()
    assert fetching().read_bytes() == CONTENT
    assert fetching.ranges == ["bytes=120000-"]
    assert fetching.names == ["model.pt"]


def test_tries_are_counted_anew_when_more_has_arrived(fetching: Fetching) -> None:
    assert fetching(*[bad.breaks_off(20_000)] * 10, tries=2).read_bytes() == CONTENT
    assert fetching.waits == [1.0] * 10


@pytest.mark.parametrize("validators", [bad.etag, bad.modified])
def test_a_file_that_changes_between_tries_begins_anew(
    fetching: Fetching, validators: Callable[[bytes], dict[str, str]]
) -> None:
    fetching.server.validators = validators
    other = OTHER if validators is bad.etag else pt_file(300_001, seed=1)
    change = bad.then(bad.breaks_off(100_000), lambda: fetching.server.files.update({PATH: other}))
    assert fetching(change).read_bytes() == other
    assert fetching.ranges == [None, "bytes=100000-"]
    assert sum(fetching.progress) == len(other)


def test_a_file_that_changes_between_runs_begins_anew(fetching: Fetching) -> None:
    fetching.refused(ResourceError, "closed early", bad.breaks_off(120_000), *[bad.breaks_off(0)] * 4)
    fetching.server.files[PATH] = OTHER
    assert fetching().read_bytes() == OTHER


def test_a_changed_file_from_a_server_that_ignores_if_range_begins_anew(fetching: Fetching) -> None:
    def anyway(handler: bad.Handler, content: bytes) -> None:
        del handler.headers["If-Range"]
        handler.plain(content)

    change = bad.then(bad.breaks_off(100_000), lambda: fetching.server.files.update({PATH: OTHER}))
    assert fetching(change, anyway).read_bytes() == OTHER
    assert fetching.ranges == [None, "bytes=100000-", None]


def test_a_file_that_has_become_shorter_begins_anew(fetching: Fetching) -> None:
    shorter = pt_file(290_000, seed=2)
    change = bad.then(bad.breaks_off(299_000), lambda: fetching.server.files.update({PATH: shorter}))

    def anyway(handler: bad.Handler, content: bytes) -> None:
        del handler.headers["If-Range"]
        handler.plain(content)

    assert fetching(change, anyway).read_bytes() == shorter


def test_the_right_total_is_wanted_of_each_part(fetching: Fetching) -> None:
    lie = bad.part_headers(Content_Range=f"bytes 100000-200000/{len(CONTENT) + 9}", Content_Length=None)
    assert fetching(bad.breaks_off(100_000), lie).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "lie",
    ["bytes 0-99999/300128", "bytes 100001-300127/300128", "bytes 100000-300128/300128", "bytes */300128", "all", None],
)
def test_another_part_than_was_asked_for_is_not_taken(fetching: Fetching, lie: str | None) -> None:
    assert fetching(bad.breaks_off(100_000), bad.part_headers(Content_Range=lie)).read_bytes() == CONTENT
    assert fetching.ranges == [None, "bytes=100000-", "bytes=100000-"]


def test_a_part_without_its_version_is_taken_where_the_question_named_it(fetching: Fetching) -> None:
    # a 206 may leave out what the question said
    assert fetching(bad.breaks_off(100_000), bad.part_headers(ETag=None)).read_bytes() == CONTENT
    assert fetching.ranges == [None, "bytes=100000-"]


def test_a_server_that_sends_less_than_the_rest_is_asked_again(fetching: Fetching) -> None:
    def some(handler: bad.Handler, content: bytes) -> None:
        handler.headers.replace_header("Range", f"{handler.headers['Range']}150000")
        handler.plain(content)

    assert fetching(bad.breaks_off(100_000), some).read_bytes() == CONTENT
    assert fetching.ranges == [None, "bytes=100000-", "bytes=150001-"]
    assert len(fetching.waits) == 1


def test_a_server_without_ranges_sends_all_again(fetching: Fetching) -> None:
    assert fetching(bad.breaks_off(100_000), bad.ignores_range()).read_bytes() == CONTENT
    assert sum(fetching.progress) == len(CONTENT)


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(fetching: Fetching) -> None:
    fetching.refused(ResourceError, "4 times in a row", *[bad.ignores_range(100_000)] * 9)


@pytest.mark.parametrize("validators", [lambda content: {}, bad.weak_etag])
def test_nothing_is_joined_where_the_version_is_not_known(
    fetching: Fetching, validators: Callable[[bytes], dict[str, str]]
) -> None:
    fetching.server.validators = validators
    change = bad.then(bad.breaks_off(100_000), lambda: fetching.server.files.update({PATH: OTHER}))
    assert fetching(change).read_bytes() == OTHER
    assert fetching.ranges == [None, None]


@pytest.mark.parametrize("note", [None, "", "{}", "[]", '{"total": "x", "tag": "y"}', '{"total": 5, "tag": "y"}'])
def test_a_part_of_no_known_version_is_dropped(fetching: Fetching, note: str | None) -> None:
    (fetching.folder / "model.pt.part").write_bytes(b"x" * 1000)
    if note is not None:
        (fetching.folder / "model.pt.part.json").write_text(note)
    assert fetching().read_bytes() == CONTENT
    assert fetching.names == ["model.pt"]
    assert sum(fetching.progress) == len(CONTENT) - 1000


def test_a_part_that_is_all_there_needs_no_server(fetching: Fetching) -> None:
    (fetching.folder / "model.pt.part").write_bytes(CONTENT)
    (fetching.folder / "model.pt.part.json").write_text(json.dumps({"total": len(CONTENT), "tag": '"a"'}))
    assert fetching().read_bytes() == CONTENT
    assert fetching.ranges == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_later(fetching: Fetching, status: int) -> None:
    busy = bad.answers(status)
    assert fetching(busy, busy, busy).read_bytes() == CONTENT
    assert fetching.waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("after", "wait_s"),
    [
        ("7", 7),
        ("0", 1),
        ("86400", 120),
        ("Sun, 09 Sep 2001 01:47:00 GMT", 20),
        ("Sun, 09 Sep 2001 01:40:00 GMT", 1),
        ("soon", 1),
        ("9" * 400, 120),
    ],
)
def test_retry_after_is_heeded_up_to_a_limit(fetching: Fetching, after: str, wait_s: float) -> None:
    assert fetching(bad.answers(503, Retry_After=after)).read_bytes() == CONTENT
    assert fetching.waits == [wait_s]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            403,
            "403 Forbidden; an address that Meta sends expires after a while: ask for a new one, and put it in quotes",
        ),
        (401, "401 Unauthorized; an address"),
        (404, "404 Not Found; check the address, or name a mirror with --url"),
        (410, "410 Gone; check"),
        (299, "does not say how long"),
    ],
)
def test_what_is_not_there_is_asked_for_once(fetching: Fetching, status: int, said: str) -> None:
    fetching.refused(CheckpointError, said, bad.answers(status))
    assert fetching.waits == []
    assert fetching.names == []


def test_redirects_are_followed_and_the_range_goes_with_them(fetching: Fetching) -> None:
    fetching.server.files["/start"] = b""
    fetching.server.always["/start"] = bad.answers(302, Location=f"{fetching.server.url}{PATH}?a=b")
    file = File("model.pt", f"{fetching.server.url}/start", 290_000)
    assert fetching(bad.breaks_off(100_000), file=file).read_bytes() == CONTENT
    assert fetching.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[x/", "HERE"])
def test_redirects_that_leave_http_or_go_in_circles_are_refused(fetching: Fetching, location: str) -> None:
    to = location.replace("HERE", f"{fetching.server.url}{PATH}?key=secret")
    fetching.refused(CheckpointNotFound, r"redirect", *[bad.answers(302, Location=to)] * 20)
    assert fetching.waits == []


def test_a_file_far_shorter_than_its_weights_is_not_even_fetched(fetching: Fetching) -> None:
    fetching.server.files[PATH] = b"<html>Please log in</html>"
    fetching.refused(CheckpointCorrupt, "has 26 bytes, but its weights take 290000")
    assert fetching.names == []


def test_a_file_longer_than_the_server_says_is_refused_and_removed(fetching: Fetching) -> None:
    fetching.refused(CheckpointCorrupt, "cut short on the server; removed", bad.claims(295_000))
    assert fetching.names == []


def test_a_file_shorter_than_the_server_says_is_never_whole(fetching: Fetching) -> None:
    fetching.refused(ResourceError, "closed early", *[bad.claims(400_000)] * 9)


def test_an_answer_that_does_not_say_its_length_is_refused(fetching: Fetching) -> None:
    fetching.refused(CheckpointError, "does not say how long", bad.part_headers(Content_Length=None))


def test_a_compressed_answer_is_refused(fetching: Fetching) -> None:
    fetching.refused(CheckpointError, "encoding 'gzip'", bad.part_headers(Content_Encoding="gzip"))


def test_what_is_not_http_is_tried_again(fetching: Fetching) -> None:
    def garbage(handler: bad.Handler, content: bytes) -> None:
        handler.wfile.write(b"\x00\x01secret\r\n\r\n")

    fetching.refused(ResourceError, "not proper HTTP: BadStatusLine, 4 times", *[garbage] * 9)


def test_a_checksum_that_is_known_is_held_against_the_file(fetching: Fetching) -> None:
    right = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    assert fetching(file=fetching.file(md5=right)).read_bytes() == CONTENT
    (fetching.folder / "model.pt").unlink()
    fetching.refused(TokenizerError, "its md5 is not 0000", file=fetching.file(md5="0" * 32))
    assert fetching.names == []


def test_the_query_of_an_address_is_asked_and_never_shown(fetching: Fetching, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    fetching(bad.answers(503), file=fetching.file(query="?Signature=secret&Key=s3cret"))
    assert fetching.server.asked[0][1] == "Signature=secret&Key=s3cret"
    (fetching.folder / "model.pt").unlink()
    for fault in (bad.answers(403), bad.answers(302, Location="ftp://x/?secret"), bad.claims(10), bad.breaks_off(0)):
        with pytest.raises(MetaseqApiError) as refusal:
            fetching(*[fault] * 9, file=fetching.file(query="?Signature=secret&Key=s3cret"))
        assert "s3cret" not in str(refusal.value)
        assert "secret" not in str(refusal.value)
    assert "secret" not in caplog.text
    assert "s3cret" not in caplog.text


def test_no_server_at_all_is_said_in_one_line(fetching: Fetching) -> None:
    fetching.refused(ResourceError, "Connection refused, 4 times", file=File("model.pt", "http://127.0.0.1:9/x", 1))


def test_a_full_disk_keeps_what_has_arrived(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    write = fetch_module.os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        if at + len(data) > 150_000:
            raise OSError(28, "No space left on device")
        return write(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module.os, "pwrite", full)
        fetching.refused(ResourceError, "the disk is full", bad.dribbles(10_000))
    left = arrived(fetching.file(), fetching.folder)
    assert 0 < left <= 150_000
    assert fetching().read_bytes() == CONTENT
    assert fetching.ranges == [None, f"bytes={left}-"]


def test_a_fetch_that_is_stopped_can_be_taken_up(fetching: Fetching) -> None:
    class Enough(Exception):
        pass

    def stop(num_bytes: int) -> None:
        if num_bytes > 0:
            raise Enough

    fetching.server.faults[PATH] = [bad.dribbles(10_000)]
    with pytest.raises(Enough):
        fetch(fetching.file(), fetching.folder, Web(), patience=Patience(), pause=print, progress=stop)
    assert fetching.names == ["model.pt.part", "model.pt.part.json"]
    left = arrived(fetching.file(), fetching.folder)
    assert fetching().read_bytes() == CONTENT
    assert fetching.ranges == [None, f"bytes={left}-"]


def test_the_final_name_appears_only_with_the_last_byte(fetching: Fetching) -> None:
    seen: list[bool] = []
    fetching.server.faults[PATH] = [bad.breaks_off(1000), bad.dribbles(50_000)]
    fetch(
        fetching.file(),
        fetching.folder,
        Web(),
        patience=Patience(),
        pause=lambda s: None,
        progress=lambda n: seen.append((fetching.folder / "model.pt").exists()),
    )
    assert len(seen) > 2
    assert not any(seen)


def test_two_processes_do_not_fetch_the_same_file(fetching: Fetching) -> None:
    part = fetching.folder / "model.pt.part"
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fetching.refused(ResourceError, "is being fetched by another process")


def test_a_folder_that_cannot_be_written_is_said_in_one_line(fetching: Fetching) -> None:
    (fetching.folder / "model.pt.part").mkdir()
    fetching.refused(ResourceError, "cannot be written: Is a directory")


def test_a_whole_file_is_kept(fetching: Fetching) -> None:
    assert not kept(fetching.file(), fetching.folder, lambda: 5)
    path = fetching.folder / "model.pt"
    path.write_bytes(b"12345")
    assert kept(fetching.file(), fetching.folder, lambda: 5)
    with pytest.raises(CheckpointMismatch, match=r"has 5 bytes, .* has 6: it was cut short or is of another model"):
        kept(fetching.file(), fetching.folder, lambda: 6)
    assert kept(fetching.file(md5="827ccb0eea8a706c4c34a16891f84e7b"), fetching.folder, lambda: 1 // 0)
    with pytest.raises(TokenizerError, match="is not OPT's"):
        kept(fetching.file(md5="0" * 32), fetching.folder, lambda: 1 // 0)
    assert path.read_bytes() == b"12345"


def test_waits_double_up_to_a_limit() -> None:
    patience = Patience(first_wait_s=1, most_wait_s=10)
    assert [patience.wait_s(n, 0) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]


def test_no_thread_is_left(fetching: Fetching) -> None:
    before = threading.active_count()
    fetching()
    assert threading.active_count() <= before + 1  # the server's for this connection
