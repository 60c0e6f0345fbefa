"""A rank that keeps its record as the real one does, and tells its service's name to whoever connects. No torch."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading

from metaseq_api.launch.recorder import recorded
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.settings import Settings


def run_rank(settings: Settings, rank: RankInfo, sock: socket.socket | None, terms: object) -> int:
    if sock is None:
        threading.Event().wait()
    assert sock is not None
    with recorded(settings, rank, sock) as recorder:
        signal.signal(signal.SIGTERM, lambda *_: end(sock))
        sock.listen()
        recorder.loading(10)(10)
        recorder.ready()
        try:
            while True:
                client, _ = sock.accept()
                with client:
                    client.sendall((settings.service or "").encode())
        except OSError:  # the listening socket was shut down
            recorder.draining("told to end")
            return 0


def end(sock: socket.socket) -> None:
    """Stop listening; under SLURM the signal comes more than once."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
