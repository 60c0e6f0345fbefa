"""Ranks that refuse to be any."""

from __future__ import annotations

import socket

from metaseq_api.errors import MemoryTooSmall
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.settings import Settings


def run_rank(settings: Settings, rank: RankInfo, sock: socket.socket | None, terms: object) -> int:
    raise MemoryTooSmall("this is not my day")
