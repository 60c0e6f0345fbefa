"""constants.py keeps metaseq's names, and refuses by name what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaseq_api import settings
from metaseq_api.errors import SettingsError

ROOT = Path(__file__).parents[1]


def constants(folder: Path, text: str) -> Path:
    path = folder / "constants.py"
    path.write_text(text)
    return path


def test_with_nothing_named_the_demo_serves(tmp_path: Path) -> None:
    found, remarks = settings.load({}, cwd=tmp_path)
    assert found.demo
    assert found.checkpoint == settings.DEMO
    assert (found.port, found.host, remarks) == (6010, "127.0.0.1", [])


def test_the_file_at_the_root_of_this_project_changes_nothing() -> None:
    assert settings.load({}, cwd=ROOT) == settings.load({}, cwd=ROOT / "tests")


def test_an_old_metaseq_file_still_works(tmp_path: Path) -> None:
    constants(
        tmp_path,
        """
import os
MAX_SEQ_LEN = 2048
BATCH_SIZE = 2048
MAX_BATCH_TOKENS = 3072
MAX_BEAM = 16
DEFAULT_PORT = 6011
MODEL_PARALLEL = 2
TOTAL_WORLD_SIZE = 2
CHECKPOINT_FOLDER = "/example/175B/reshard_no_os"
MODEL_FILE = os.path.join(CHECKPOINT_FOLDER, "reshard.pt")
BPE_MERGES = os.path.join(CHECKPOINT_FOLDER, "gpt2-merges.txt")
BPE_VOCAB = os.path.join(CHECKPOINT_FOLDER, "gpt2-vocab.json")
LAUNCH_ARGS = [f"--model-parallel-size {MODEL_PARALLEL}"]
INFERENCE_ARG_OVERRIDES = {}
""",
    )
    found, remarks = settings.load({}, cwd=tmp_path)
    assert found.checkpoint == Path("/example/175B/reshard_no_os")
    assert (found.model_parallel, found.port, found.max_batch_tokens) == (2, 6011, 3072)
    assert not found.demo
    assert [r.split(": ")[1].split()[0] for r in remarks] == ["BATCH_SIZE", "LAUNCH_ARGS", "INFERENCE_ARG_OVERRIDES"]


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    constants(tmp_path, "DEFAULT_PORT = 7000\nMAX_SEQ_LEN = 100")
    found, _ = settings.load({"port": 8000, "max_seq_len": None}, cwd=tmp_path)
    assert (found.port, found.max_seq_len) == (8000, 100)


def test_metaseqs_quirks_are_off_unless_asked_for(tmp_path: Path) -> None:
    assert not settings.load({"metaseq_compat": None}, cwd=tmp_path)[0].metaseq_compat
    constants(tmp_path, "METASEQ_COMPAT = True")
    assert settings.load({"metaseq_compat": None}, cwd=tmp_path)[0].metaseq_compat


def test_the_environment_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.ENV_CONSTANTS, str(constants(tmp_path, "DEFAULT_PORT = 7001")))
    assert settings.load({}, cwd=ROOT)[0].port == 7001


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MAX_SEQ_LENGTH = 5", "unknown name MAX_SEQ_LENGTH; did you mean MAX_SEQ_LEN"),
        ("DEFAULT_PORT = '6010'", "DEFAULT_PORT is '6010'; it must be a whole number"),
        ("MODEL_PARALLEL = True", "MODEL_PARALLEL is True; it must be a whole number"),
        ("MODEL_PARALLEL = 8\nTOTAL_WORLD_SIZE = 16", "TOTAL_WORLD_SIZE is 16 but MODEL_PARALLEL is 8"),
        ("METASEQ_COMPAT = 1", "METASEQ_COMPAT is 1; it must be True or False"),
        ("DTYPE = 'float16'", "DTYPE is 'float16'; it must be one of fp32, fp16, bf16"),
        ("PREFIX_CACHE = 1", "PREFIX_CACHE is 1; it must be True or False"),
        ("CACHE_LIST_SIZE = 2", "set CACHE_SIZE (--cache-size) too"),
        ("CACHE_SIZE = -1", "CACHE_SIZE is -1; it must be a whole number from 0"),
        ("raise RuntimeError('edit me')", "RuntimeError: edit me"),
        ("x = (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = constants(tmp_path, text)
    with pytest.raises(SettingsError, match=r"constants\.py|CACHE_LIST_SIZE") as e:
        settings.load({}, constants=str(path))
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--constants names .*nowhere"):
        settings.load({}, constants=str(tmp_path / "nowhere.py"))
