"""metaseq-api-local: what it refuses in one line, and whom it starts."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.processes import clean_env, family, until

DOOR = [sys.executable, "-m", "support.door"]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The door, in an empty folder and an environment without launchers; starting anything fails the test."""
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("metaseq_api.cli.interactive_hosted")

    def supervise(*_: object, sock: socket.socket, **__: object) -> None:
        sock.close()
        pytest.fail("something was started")

    monkeypatch.setattr(module.supervisor, "supervise", supervise)
    monkeypatch.setattr(module.log, "setup", lambda *a, **k: None)
    return module


def refused(door: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = door.main(list(argv))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("metaseq-api-local: error: ")
    assert err.count("\n") == 1
    return code, err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--modelparallel", "2"], "did you mean --model-parallel?"),
        (["--prot=80"], "did you mean --port?"),
        (["--model-par", "2"], "did you mean --model-parallel?"),
        (["--port", "abc"], "argument --port: invalid int value: 'abc'"),
        (["--port", "70000"], "--port is 70000; it must be a whole number from 0 to 65535"),
        (["--model-parallel", "0"], "--model-parallel is 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--constants", "nowhere.py"], "--constants names nowhere.py, which is not a file"),
    ],
)
def test_an_unusable_flag_is_refused_in_one_line(
    door: ModuleType, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, err = refused(door, capsys, *argv)
    assert code == 2
    assert said in err


def test_an_unknown_name_in_constants_is_refused(
    door: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "constants.py").write_text("MODEL_PARALEL = 2\n")
    code, err = refused(door, capsys)
    assert code == 2
    assert "did you mean MODEL_PARALLEL?" in err


def test_a_checkpoint_that_is_not_there_is_refused(door: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = refused(door, capsys, "nowhere/opt")
    assert code == 3
    assert "no checkpoint at nowhere/opt" in err


@pytest.mark.parametrize("name", ["reshard.pt", "reshard"])
def test_metaseqs_name_for_a_set_of_files_is_not_refused(door: ModuleType, tmp_path: Path, name: str) -> None:
    (tmp_path / "reshard-model_part-0.pt").touch()
    with pytest.raises(pytest.fail.Exception, match="something was started"):
        door.main([str(tmp_path / name), "--port", "0"])


@pytest.mark.parametrize("flag", ["--vocab-filename", "--merges-filename"])
def test_a_tokenizer_file_that_is_not_there_is_refused(
    door: ModuleType, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    code, err = refused(door, capsys, flag, "nowhere.json")
    assert code == 7
    assert f"{flag} (or constants.py) names nowhere.json" in err


@pytest.mark.parametrize(
    ("text", "said"), [("{% if %}", "must be a Jinja2 template"), (None, "nowhere.jinja cannot be")]
)
def test_a_chat_template_that_cannot_be_used_is_refused_before_anything_is_started(
    door: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, said: str
) -> None:
    template = tmp_path / "nowhere.jinja"
    if text is not None:
        template.write_text(text)
    code, err = refused(door, capsys, "--chat-template", str(template), "--port", "0")
    assert code == 2
    assert said in err


def test_a_port_in_use_is_refused_before_anything_is_started(
    door: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, err = refused(door, capsys, "--port", port)
    assert code == 9
    assert f"port {port} on 127.0.0.1" in err


def test_more_ranks_than_gpus_are_refused(
    door: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.rendezvous, "visible_gpus", lambda environ: 2)
    code, err = refused(door, capsys, "--model-parallel", "4")
    assert code == 8
    assert "4 GPUs, but 2 are visible; pass --model-parallel 2 or --device cpu" in err


def test_another_number_of_ranks_than_torchruns_is_refused(
    door: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a"}
    for name, value in (torchrun | {"MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    code, err = refused(door, capsys, "--model-parallel", "2")
    assert code == 2
    assert "split over 2 ranks, but srun or torchrun started 4" in err


@pytest.mark.parametrize(
    ("argv", "constants", "num_gpus", "num_ranks"),
    [
        ([], "", 0, 1),
        (["CHECKPOINT"], "", 4, 4),
        ([], "", 4, 1),  # the demo is too small to be split unless one asks
        (["CHECKPOINT", "--device", "cpu"], "", 4, 1),
        (["CHECKPOINT"], "MODEL_PARALLEL = 2", 4, 2),
        (["CHECKPOINT"], "TOTAL_WORLD_SIZE = 2", 0, 2),
        (["CHECKPOINT", "--model-parallel", "3"], "MODEL_PARALLEL = 2", 4, 3),
    ],
)
def test_ranks_are_as_told_else_one_per_gpu_else_one(
    door: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argv: list[str],
    constants: str,
    num_gpus: int,
    num_ranks: int,
) -> None:
    (tmp_path / "CHECKPOINT").mkdir()
    (tmp_path / "constants.py").write_text(constants)
    started: list[int] = []
    monkeypatch.setattr(door.rendezvous, "visible_gpus", lambda environ: num_gpus)

    def supervise(placement: object, n: int, settings: object, *, sock: socket.socket, **_: object) -> int:
        sock.close()
        started.append(n)
        return 0

    monkeypatch.setattr(door.supervisor, "supervise", supervise)
    assert door.main([*argv, "--port", "0"]) == 0
    assert started == [num_ranks]


def test_the_parent_never_loads_torch_or_flask() -> None:
    script = (
        "import sys, importlib; door = importlib.import_module('metaseq_api.cli.interactive_hosted');"
        "door._bind('127.0.0.1', 0).close();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'flask', 'waitress')))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd="/", timeout=60, check=False).returncode == 0


def test_flags_and_constants_reach_every_rank(tmp_path: Path) -> None:
    constants = tmp_path / "site.py"
    constants.write_text("MAX_SEQ_LEN = 77\nMODEL_PARALLEL = 2\nMODEL_SHARED_FOLDER = '/old'\n")
    argv = [*DOOR, "--constants", str(constants), "--port", "0", "--dtype", "bf16", "--threads", "1"]
    argv.append("--metaseq-compat")
    with family(argv, tmp_path) as f:
        told = f.up(2)
        for t in told:
            s = t["settings"]
            assert (s["max_seq_len"], s["model_parallel"], s["dtype"], s["threads"]) == (77, 2, "bf16", 1)
            assert s["metaseq_compat"] is True
        assert told[0]["port"] not in (None, 0)
        os.kill(f.parent.pid, signal.SIGINT)
        code, err = f.end()
        assert code == 0
        assert "MODEL_SHARED_FOLDER has no effect here" in err
        f.assert_nothing_left()


def test_an_error_of_a_rank_is_one_line_and_the_exit_code(tmp_path: Path) -> None:
    with family([*DOOR, "--port", "0"], tmp_path, DUMMY_RANK0="error") as f:
        f.up(1)
        f.go()
        assert f.end() == (4, "metaseq-api-local: error: reshard-model_part-1.pt is cut short; copy it again\n")


def test_a_killed_rank_is_one_line_and_exit_code_20(tmp_path: Path) -> None:
    with family([*DOOR, "--port", "0", "--model-parallel", "2"], tmp_path) as f:
        os.kill(f.up(2)[1]["pid"], signal.SIGKILL)
        code, err = f.end()
        assert code == 20
        # an empty line before it: another rank, killed while it writes its stack, leaves half a line
        assert err.startswith("\nmetaseq-api-local: error: rank 1 of 2 (pid ")
        assert err.count("\n") == 2
        f.assert_nothing_left()


def torchrun(folder: Path, num_ranks: int, *argv: str) -> list[str]:
    logs = ["--log-dir", str(folder / "logs")]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *logs]
    return [*run, "-m", "support.door", "--port", "0", *argv]


def test_under_torchrun_each_process_is_one_rank(tmp_path: Path) -> None:
    with family(torchrun(tmp_path, 2), tmp_path, DUMMY_ONCE="1", OMP_NUM_THREADS="1") as f:
        told = f.up(2)
        assert [(t["rank"]["rank"], t["rank"]["local_rank"]) for t in told] == [(0, 0), (1, 1)]
        assert {(t["rank"]["world_size"], t["rank"]["init"].split(":")[0]) for t in told} == {(2, "agent")}
        assert [t["port"] is not None for t in told] == [True, False]
        assert f.end()[0] == 0


def test_a_killed_torchrun_takes_its_ranks_along(tmp_path: Path) -> None:
    with family(torchrun(tmp_path, 2), tmp_path, OMP_NUM_THREADS="1") as f:
        f.up(2)
        os.kill(f.parent.pid, signal.SIGKILL)
        f.parent.wait(timeout=10)
        f.assert_nothing_left_running()


def test_a_follower_under_torchrun_outlives_sigterm_for_rank_0_to_end_with_it(tmp_path: Path) -> None:
    with family(torchrun(tmp_path, 2), tmp_path, OMP_NUM_THREADS="1", DUMMY_RANK0="drain", DUMMY_RANK1="follow") as f:
        f.up(2)
        os.kill(f.parent.pid, signal.SIGTERM)
        until((tmp_path / "drained").exists, "rank 0 to end its requests")
        assert (tmp_path / "drained").read_text() == "SIGTERM with rank 1"
        f.end()
        f.assert_nothing_left_running()


def test_the_help_names_every_flag(door: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        door.main(["--help"])
    assert stop.value.code == 0
    assert {"--model-parallel", "--constants", "--dtype"} <= set(capsys.readouterr().out.split())
