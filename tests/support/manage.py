"""What tests of metaseq-api-slurm ask about its services."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import psutil

from metaseq_api.launch.registry import Registry

Manage = Callable[..., tuple[int, str, str]]
"""Runs a command: exit code, output, messages."""


def processes_of(registry: Registry) -> list[psutil.Process]:
    """What jobs of this registry's services run, on any node: all nodes are this machine."""
    found = []
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if p.environ().get("METASEQ_API_REGISTRY") == str(registry.folder):
                found.append(p)
    return found


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def job_of(registry: Registry, name: str) -> str:
    submission = registry.submission(name)
    assert submission
    return submission.job
