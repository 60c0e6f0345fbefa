"""A rank that does nothing but what the test says: no torch, up in a tenth of a second.

$DUMMY_DIR is where it leaves `rankN.json` once it is up; a file `go` there sets off what $DUMMY_RANKN says it shall do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

from metaseq_api.errors import CheckpointCorrupt, RankFailed
from metaseq_api.launch.child import ignore_stops
from metaseq_api.launch.order import settings_to_dict
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings


def run_rank(settings: Settings, rank: RankInfo, sock: socket.socket | None, terms: Terms) -> int:
    here = Path(os.environ["DUMMY_DIR"])
    role = os.environ.get(f"DUMMY_RANK{rank.rank}", "serve")
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if role == "ignore-term":
            signal.signal(stop, lambda *_: (here / f"term{rank.rank}").touch())
        if role == "drain":
            signal.signal(stop, lambda signum, _: drain(here, signum))
    if role == "follow":
        ignore_stops()
    told = {"pid": os.getpid(), "rank": dataclasses.asdict(rank), "settings": settings_to_dict(settings)}
    told["terms"] = dataclasses.asdict(terms)
    told["port"] = sock.getsockname()[1] if sock else None
    told["cuda"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    told["store"] = store(rank.init)
    part = here / f"rank{rank.rank}.part"
    part.write_text(json.dumps(told))
    part.rename(part.with_suffix(".json"))
    if os.environ.get("DUMMY_ONCE"):  # report and end
        return 0
    wait_for(here / "go")
    return act(role, rank, here)


def store(init: str) -> list[object] | None:
    """Device and inode, rights and number of names of the file where the ranks meet."""
    if not init.startswith("file://"):
        return None
    stat = os.stat(init[len("file://") :])
    return [stat.st_dev, stat.st_ino, oct(stat.st_mode & 0o777), stat.st_nlink]


def act(role: str, rank: RankInfo, here: Path) -> int:
    if role == "error":
        raise CheckpointCorrupt("reshard-model_part-1.pt is cut short; copy it again")
    if role == "error-after-peer":
        wait_for(here / "lost-a-peer")
        raise CheckpointCorrupt("reshard-model_part-1.pt is cut short; copy it again")
    if role == "lose-a-peer":
        (here / "lost-a-peer").touch()
        raise RankFailed("rank 1 closed its connection")
    if role == "crash":
        raise ZeroDivisionError("nobody foresaw this")
    if role == "exit-77":
        os._exit(77)
    if role == "done-with-thread":
        threading.Thread(target=threading.Event().wait).start()
        return 0
    if role == "done":
        return 0
    threading.Event().wait()
    return 0


def drain(here: Path, signum: int) -> None:
    """What rank 0 does on SIGTERM: answer with the others' help, then end."""
    follower = json.loads((here / "rank1.json").read_text())["pid"]
    alive = Path(f"/proc/{follower}/stat").read_text().split()[2] != "Z"
    part = here / "drained.part"
    part.write_text(f"{signal.Signals(signum).name} {'with rank 1' if alive else 'alone'}")
    part.rename(here / "drained")
    os.kill(follower, signal.SIGKILL)  # its dismissal
    os._exit(0)


def wait_for(path: Path) -> None:
    """Wait as long as it takes: the test that forgets us ends us."""
    while not path.exists():
        time.sleep(0.01)
