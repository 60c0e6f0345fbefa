"""On a fresh machine the two commands do all the set-up; the wheel puts one package into site-packages, and its
commands run from anywhere. Installs into new environments: `make test-fresh`."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.readme import ROOT, command, first_answer

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, in a new folder."""
    folder = tmp_path_factory.mktemp("clone") / "metaseq-api"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def fresh_environ(**more: str) -> dict[str, str]:
    """This machine's environment without ours."""
    keep = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    keep["PATH"] = ":".join(p for p in keep["PATH"].split(":") if p != str(Path(sys.executable).parent))
    return keep | more


def test_make_serve_does_all_the_set_up_and_the_readmes_curl_is_answered(clone: Path) -> None:
    base = Path(sys.base_prefix) / "bin/python3"
    service = subprocess.Popen(
        ["make", "serve", f"PYTHON={base}", "PORT=0"],
        cwd=clone,
        env=fresh_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert service.stdout
    said = []
    try:
        for line in service.stdout:
            said.append(line)
            if found := re.search(r"ready on (http://[^/]+)/", line):
                break
        else:
            pytest.fail("".join(said))
        curl = command("curl").replace("http://127.0.0.1:6010", found[1])
        answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout)
        assert answer["choices"] == first_answer()["choices"]
    finally:
        os.killpg(service.pid, signal.SIGINT)  # as a terminal's Ctrl-C does: to make and the service alike
        began = time.monotonic()
        service.communicate(timeout=30)
        assert time.monotonic() - began < 5


def test_the_wheel_holds_one_package_and_its_commands_run_anywhere(clone: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "-o", str(tmp_path)], cwd=clone, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env/bin/python"
    install = [python, "-m", "pip", "install", "-q", "-c", clone / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True, env=fresh_environ())
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    for stray in ("cli", "scripts", "slurm", "tests", "constants.py"):
        assert not (site / stray).exists()
    record = next(site.glob("metaseq_api-*.dist-info")) / "RECORD"
    tops = {line.split(",")[0].split("/")[0] for line in record.read_text().splitlines()}
    assert {t for t in tops if not t.endswith(".dist-info")} <= {"metaseq_api", ".."}
    setup = configparser.ConfigParser()
    setup.read(clone / "setup.cfg")
    scripts = [s.split("=")[0].strip() for s in setup["options.entry_points"]["console_scripts"].strip().splitlines()]
    for script in scripts:
        done = subprocess.run([tmp_path / "env/bin" / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert script in done.stdout
    for module in ("scripts.reshard_fsdp", "scripts.reshard_mp", "cli.interactive_hosted"):
        line = [python, "-m", f"metaseq_api.{module}", "--help"]
        assert subprocess.run(line, cwd=tmp_path, capture_output=True).returncode == 0, module
