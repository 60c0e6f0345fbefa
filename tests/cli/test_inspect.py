"""metaseq-api-inspect tells what a folder holds, and by its exit code whether it can be served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from metaseq_api.cli.inspect_checkpoint import main
from metaseq_api.scripts.to_hugging_face import main as to_hugging_face

from metaseq_api.settings import DEMO


def test_it_tells_layout_model_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DEMO), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "2 parts x 2 shards" in facts["layout"]
    assert "4 layers of 256" in facts["model"]
    assert facts["dtypes"].startswith("float16")
    assert "1, 2, 4 rank(s)" in facts["tensor-parallel"]
    assert "findings" not in facts


def test_a_sound_checkpoint_is_verified_with_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DEMO), "--verify"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (said["findings"], said["remarks"]) == ("none", "none")


def test_a_damaged_one_names_the_file_and_ends_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    names = [folder / f"checkpoint_last-model_part-0-shard{k}.pt" for k in (0, 1)]
    shutil.copy(names[0], names[1])
    code = main([str(folder), "--verify"])
    said = capsys.readouterr()
    assert code in (4, 5)  # 5 where the padding alone tells already
    assert names[1].name in said.out + said.err


def test_published_sums_are_held_against_the_files_and_decide_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    name = "checkpoint_last-model_part-0-shard0.pt"
    for path, flags in (
        (folder / "demo_md5sum.csv", []),
        (tmp_path / "x.csv", ["--checksums", str(tmp_path / "x.csv")]),
    ):
        path.write_text(f"shard,md5sum\n{name},{0:032x}\nelsewhere.pt,{1:032x}\n")
        assert main([str(folder), "--verify", "--json", *flags]) == 0
        path.unlink()
        facts = json.loads(capsys.readouterr().out)
        assert facts["findings"] == []
        assert [remark.split(": ")[0] for remark in facts["remarks"]] == [str(path), str(folder / name)]
    assert main([str(folder), "--checksums", "x.csv"]) == 2


def test_a_hugging_face_folder_is_inspected_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert to_hugging_face(["--input", str(DEMO), "--output", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "hf"), "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["findings"] == []
    assert "4 layers of 256" in facts["model"]


def test_what_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 3
    err = capsys.readouterr().err
    assert "nowhere" in err
    assert len(err.splitlines()) == 1
