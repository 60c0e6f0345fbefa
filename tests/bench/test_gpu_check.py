"""The GPU check runs where nothing is installed but what a machine with a GPU has of itself; here on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metaseq_api.bench import gpu_check, gpu_parity
from metaseq_api.bench.gpu_parity import Check

ROOT = Path(__file__).parents[2]
BLOCKER = "import sys\nsys.modules.update(dict.fromkeys({blocked}))\n"  # each import of these fails
ABSENT = ("fairscale", "flask", "waitress", "werkzeug", "submitit", "jinja2", "prometheus_client")


def python(tmp_path: Path, blocked: tuple[str, ...], *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, in which these modules, and those of every child, cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.replace("{blocked}", repr(blocked)))
    env = {"PYTHONPATH": f"{tmp_path}:.", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=220)


def test_the_engine_the_model_and_the_check_import_without_what_only_a_service_needs(tmp_path: Path) -> None:
    done = python(tmp_path, (*ABSENT, "tqdm", "transformers"), "-c", "import metaseq_api.bench.gpu_check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu_and_proves_parity(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ("--device", "cpu", "--quick", "--json", str(report))
    done = python(tmp_path, ABSENT, "-m", "metaseq_api.bench.gpu_check", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity holds" in done.stdout
    sections = json.loads(report.read_text())["sections"]
    assert [s["section"] for s in sections] == [s.name for s in gpu_check.QUICK_SECTIONS]
    assert all(s["lines"] and not s["ended"] for s in sections), sections


def test_a_check_that_fails_decides_the_exit_code_and_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"what": "x", "error": 2.0, "bound": 1.0, "strays": 0, "passed": False}
    monkeypatch.setattr(gpu_check, "_child", lambda *args, **how: ([bad], "", ""))
    assert gpu_check.main(["--device", "cpu", "--quick", "--only", "parity"]) == 1
    shown = capsys.readouterr().out
    assert "FAILS: x" in shown
    assert "PARITY FAILS" in shown


def test_a_section_over_its_time_is_ended_and_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "QUICK_SECTIONS", (gpu_check.Section(name="latency tiny", limit_s=0.05),))
    assert gpu_check.main(["--device", "cpu", "--quick"]) == 0
    assert "it took more than 0 s" in capsys.readouterr().out
    assert gpu_check.main(["--device", "cpu", "--quick", "--limit", "0"]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_parity_section_that_breaks_off_fails_the_check_and_tells_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = gpu_check.Section(name="latency opt-9", limit_s=60, decides=True)
    monkeypatch.setattr(gpu_check, "QUICK_SECTIONS", (section,))
    assert gpu_check.main(["--device", "cpu", "--quick"]) == 1
    assert "failed with code 1 (KeyError: 'opt-9')" in capsys.readouterr().out


def test_what_errs_more_than_its_bound_or_strays_does_not_pass() -> None:
    assert Check(what="", error=1.0, bound=1.0).passed
    assert not Check(what="", error=1.1, bound=1.0).passed
    assert not Check(what="", error=float("nan"), bound=1.0).passed
    assert not Check(what="", error=0.0, bound=1.0, strays=1).passed


def test_another_likeliest_token_is_forgiven_in_a_near_tie_alone() -> None:
    torch = pytest.importorskip("torch")
    want = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.9, 0.0], [1.0, 0.9, 0.0]])
    got = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert gpu_parity._strays(got, want, 0.2) == 1
    assert gpu_parity._strays(got, want, 0.05) == 2
