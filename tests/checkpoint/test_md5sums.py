"""A published list of md5 sums is advice: what differs from it is told, and nothing fails by it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from metaseq_api.checkpoint.md5sums import Md5Sums, beside
from metaseq_api.errors import SettingsError

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data"


def listed(folder: Path, text: str) -> Md5Sums:
    path = folder / "some_md5sum_shards.csv"
    path.write_text(text)
    return Md5Sums.read(path)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def test_files_that_are_as_listed_give_no_word_and_what_differs_is_a_remark(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"a" * 100)
    (tmp_path / "b.pt").write_bytes(b"b")
    sums = listed(tmp_path, f"shard,md5sum\na.pt,{md5(b'a' * 100)}\nfolder/b.pt, {md5(b'c').upper()}\n")
    done: list[int] = []
    totals: list[int] = []
    (found,) = sums.compare(tmp_path, lambda total: totals.append(total) or done.append)  # type: ignore[func-returns-value]
    assert (found.path, found.fatal) == (tmp_path / "b.pt", False)
    assert f"has the md5 sum {md5(b'b')}, not {md5(b'c')} as in some_md5sum_shards.csv (advice only: " in found.what
    assert (totals, sum(done)) == ([101], 101)


def test_a_sum_that_the_list_gives_to_two_files_is_told(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(name.encode())
    sums = listed(tmp_path, f"a.pt,{md5(b'a.pt')}\nb.pt,{md5(b'a.pt')}\n")
    (found,) = sums.compare(tmp_path)
    assert found.path == tmp_path / "b.pt"
    assert "where another file has it too" in found.what


def test_listed_files_that_are_missing_are_told_in_one_line(tmp_path: Path) -> None:
    sums = listed(tmp_path, "".join(f"x{i}.pt,{i:032x}\n" for i in range(9)))
    (found,) = sums.compare(tmp_path)
    assert not found.fatal
    assert "lists 9 of 9 files that are not in" in found.what
    assert "x0.pt, x1.pt, x2.pt, ..." in found.what


@pytest.mark.parametrize("text", ["", "a,b\n", "\x1b[2J.pt,0123456789abcdef0123456789abcdef\n", "\0" * 50])
def test_what_is_no_list_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"md5sum_shards\.csv has no line of a file's name"):
        listed(tmp_path, text)
    with pytest.raises(SettingsError, match="cannot be read"):
        Md5Sums.read(tmp_path / "no.csv")


def test_the_list_beside_a_checkpoint_is_found(tmp_path: Path) -> None:
    assert beside(tmp_path) is None
    listed(tmp_path, f"a.pt,{md5(b'')}\n")
    assert beside(tmp_path) == tmp_path / "some_md5sum_shards.csv"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="Meta's lists are not part of this project")
@pytest.mark.parametrize(("name", "num_files", "num_sums"), [("opt175b", 992, 992), ("opt66b", 8, 7)])
def test_metas_own_lists_are_read(name: str, num_files: int, num_sums: int) -> None:
    sums = Md5Sums.read(PUBLISHED / f"{name}_md5sum_shards.csv").sums
    assert (len(sums), len(set(sums.values()))) == (num_files, num_sums)
