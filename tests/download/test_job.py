"""Many files at once: all of them, or one error and what has arrived; nothing is fetched twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support import file_server as bad
from support.file_server import FileServer, pt_file
from support.processes import until

from metaseq_api.download import job
from metaseq_api.download.catalogue import File
from metaseq_api.download.fetch import Patience, arrived
from metaseq_api.download.job import download
from metaseq_api.download.web import Web
from metaseq_api.errors import CheckpointNotFound, ResourceError, SettingsError

SIZE = 100_000


@pytest.fixture
def files(server: FileServer) -> list[File]:
    server.files |= {f"/f{i}": pt_file(SIZE, seed=i) for i in range(12)}
    return [File(f"f{i}", f"{server.url}/f{i}", SIZE) for i in range(12)]


def test_all_files_come_in_order_over_bad_lines(server: FileServer, files: list[File], tmp_path: Path) -> None:
    for i, file in enumerate(files):
        fault = (bad.breaks_off(i * 5000), bad.resets(40_000), bad.answers(503), None)[i % 4]
        server.faults[f"/{file.name}"] = [fault, fault]
    paths = download(files, tmp_path / "new" / "folder", jobs=5, pause=lambda s: None)
    assert [p.name for p in paths] == [f.name for f in files]
    assert {f"/{p.name}": p.read_bytes() for p in paths} == server.files
    assert len(list(paths[0].parent.iterdir())) == 12


def test_so_many_files_come_at_once_and_no_more(server: FileServer, files: list[File], tmp_path: Path) -> None:
    active, most, lock = 0, 0, threading.Lock()
    all_here = threading.Event()

    def counted(handler: bad.Handler, content: bytes) -> None:
        nonlocal active, most
        with lock:
            active, most = active + 1, max(most, active + 1)
            if active == 3:
                all_here.set()
        assert all_here.wait(30)
        with lock:
            active -= 1  # before the answer is out: the client asks for the next one only after it
        handler.plain(content)

    server.faults = {f"/{file.name}": [counted] for file in files}
    download(files, tmp_path, jobs=3)
    assert most == 3


def test_what_is_there_is_not_fetched_again(server: FileServer, files: list[File], tmp_path: Path) -> None:
    download(files[:5], tmp_path)
    server.asked.clear()
    download(files, tmp_path)
    assert [server.ranges(f"/{f.name}") for f in files] == [[]] * 5 + [[None]] * 7


def test_the_first_file_that_cannot_be_had_ends_the_others(
    server: FileServer, files: list[File], tmp_path: Path
) -> None:
    begun = threading.Event()

    def slow(handler: bad.Handler, content: bytes) -> None:
        bad.breaks_off(50_000)(handler, content)
        handler.wfile.flush()
        begun.set()
        handler.server.closing.wait(30)

    def gone(handler: bad.Handler, content: bytes) -> None:
        assert begun.wait(30)
        until(lambda: arrived(files[0], tmp_path) == 50_000, "the other file to stall")
        bad.answers(403)(handler, content)

    server.faults = {"/f0": [slow], "/f1": [gone]}
    with pytest.raises(CheckpointNotFound, match="/f1: the server answers 403 Forbidden"):
        download(files, tmp_path, jobs=2, web=Web(timeout_s=0.9))
    assert not [f for f in files if f.name != "f1" and (tmp_path / f.name).exists()]
    server.asked.clear()
    download(files, tmp_path)
    assert {f"/{f.name}": (tmp_path / f.name).read_bytes() for f in files} == server.files
    assert server.ranges("/f0") == ["bytes=50000-"]


def test_a_missing_file_is_found_before_anything_is_fetched(
    server: FileServer, files: list[File], tmp_path: Path
) -> None:
    del server.files["/f11"]
    with pytest.raises(CheckpointNotFound, match="/f11: the server answers 404 Not Found"):
        download(files, tmp_path, jobs=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_found_before_anything_is_fetched(
    server: FileServer, files: list[File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(map(len, server.files.values()))
    usage = job.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=total - 1))
    with pytest.raises(ResourceError, match=f"{total} bytes are to come, and .* has {total - 1} free"):
        download(files, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f0.part").write_bytes(b"x")  # what is there already needs no room
    download(files, tmp_path)


def test_the_log_tells_of_all_files_together(
    server: FileServer, files: list[File], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    download(files[:2], tmp_path)
    server.faults["/f2"] = [bad.breaks_off(70_000)]
    download(files, tmp_path, pause=lambda s: None)
    assert "2 files are here, 10 to fetch" in caplog.text
    assert "fetching: 1.00MB of 1.00MB (100 %)" in caplog.text
    assert "f2: the connection was closed early; trying again in 1 s" in caplog.text


def test_ctrl_c_ends_threads_that_wait_for_their_next_try(
    server: FileServer, files: list[File], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    server.always = {f"/{f.name}": bad.answers(503) for f in files}

    class Interrupted(job.queue.SimpleQueue):  # type: ignore[type-arg]
        def get(self, *args: object) -> object:
            until(lambda: len(server.asked) >= 2, "both threads to have asked")
            raise KeyboardInterrupt

    monkeypatch.setattr(job.queue, "SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(files, tmp_path, jobs=2, patience=Patience(first_wait_s=100))
    until(lambda: threading.active_count() <= before, "the threads to end")


def test_no_jobs_or_no_folder_is_refused(files: list[File], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--jobs is 0"):
        download(files, tmp_path, jobs=0)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be made"):
        download(files, tmp_path / "file")
