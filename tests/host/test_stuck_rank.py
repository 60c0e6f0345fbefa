"""A rank that hangs is told by /health, by number, before anything else notices."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.processes import until
from support.service import Service

TIMEOUT_S = 9


def health(service: Service) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{service.url}/health", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_stopped_follower_shows_within_timeout_s(busy: bool, tmp_path: Path) -> None:
    (tmp_path / "constants.py").write_text(f"TIMEOUT_S = {TIMEOUT_S}\n")
    service = Service(tmp_path, "--model-parallel", "4")
    try:
        if busy:
            service.generate_for_ever()
        status, said = health(service)
        assert (status, said["status"], len(said["rank_age_s"])) == (200, "ok", 4)
        service.ranks[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: health(service)[0] == 503, "health to tell", TIMEOUT_S)
        assert time.monotonic() - stopped < TIMEOUT_S
        status, said = health(service)
        assert (status, said["status"], said["stuck"], said["ready"]) == (503, "stuck", True, False)
        if busy:
            assert said["step_age_s"] >= TIMEOUT_S / 2
            assert "a step has been running" in said["reason"]
        else:
            # rank 3 gets its orders through rank 1, ranks 0 and 2 do not
            assert said["reason"].startswith("rank 1, 3 not heard of for 6 s")
            assert said["rank_age_s"][1] == max(said["rank_age_s"])
            assert max(said["rank_age_s"][0], said["rank_age_s"][2]) < 2 * TIMEOUT_S / 3
        service.ranks[1].send_signal(signal.SIGCONT)
        until(lambda: health(service)[0] == 200, "health to recover", 5)
    finally:
        service.kill()
