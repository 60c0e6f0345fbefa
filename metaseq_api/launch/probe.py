"""What doctor's trial job runs, once on each node: looks at the node and tells what it found through the shared folder.

    python -m metaseq_api.launch.probe FOLDER NUM_NODES [CHECKPOINT]

Writes FOLDER/NODE.json. That it can be read from the login node is itself a finding. Nodes find each other through
FOLDER/NODE.at, where each one listens. Knows one node; does not know what is good or bad.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from metaseq_api import __version__
from metaseq_api.launch.registry import replace_json
from metaseq_api.launch.rendezvous import detect, visible_gpus

PEERS_S = 30.0
"""Units: seconds for the other nodes to come up; SLURM starts them together."""
CONNECT_S = 5.0
TORCH = """
import json, torch
nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
version = ".".join(map(str, torch.cuda.nccl.version())) if nccl and torch.cuda.is_available() else ""
memory = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "nccl": version if version else nccl, "gpus": memory}))
"""


def main(argv: list[str], environ: dict[str, str]) -> int:
    """Look at this node, tell, and wait for the others to have looked at it."""
    folder, num_nodes = Path(argv[0]), int(argv[1])
    checkpoint = Path(argv[2]) if len(argv) > 2 else None
    node = detect(environ).node
    with socket.create_server(("0.0.0.0", 0), backlog=num_nodes) as listener:
        replace_json(folder / f"{node}.at", {"port": listener.getsockname()[1]})
        found: dict[str, Any] = {
            "node": node,
            "time": time.time(),
            "version": __version__,
            "python": sys.version.split()[0],
            "gpus": visible_gpus(environ),
            "address": _address_of(node),
            "interfaces": sorted(name for _, name in socket.if_nameindex() if name != "lo"),
            "peers": _reach_peers(folder, node, num_nodes),
            "torch": _torch(),
            "checkpoint": None if checkpoint is None else _read_some(checkpoint),
        }
        replace_json(folder / f"{node}.json", found)
        # stay until the others have come, or they would find nobody
        deadline = time.monotonic() + PEERS_S
        while len(list(folder.glob("*.json"))) < num_nodes and time.monotonic() < deadline:
            time.sleep(0.1)
    return 0


def _address_of(node: str) -> str:
    try:
        return socket.gethostbyname(node)
    except OSError as e:
        return f"unknown: {e.strerror}"


def _reach_peers(folder: Path, node: str, num_nodes: int) -> dict[str, str]:
    """For each other node, "ok" or what the way to it said."""
    deadline = time.monotonic() + PEERS_S
    while len(found := {p.stem: p for p in folder.glob("*.at")}) < num_nodes and time.monotonic() < deadline:
        time.sleep(0.05)
    told = {}
    for peer, path in sorted(found.items()):
        if peer == node:
            continue
        try:
            port = int(json.loads(path.read_text())["port"])
            with socket.create_connection((peer, port), timeout=CONNECT_S):
                told[peer] = "ok"
        except (OSError, ValueError) as e:
            told[peer] = str(e)
    return told


def _torch() -> dict[str, Any]:
    """What a Python of its own tells of torch: importing it may take minutes, or crash."""
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=300, check=False)
        found: dict[str, Any] = (
            json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        return {"error": str(e)}
    return found


def _read_some(path: Path) -> dict[str, Any]:
    """How many files a checkpoint has and whether each lets itself be read."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    bad = []
    for file in files:
        try:
            with file.open("rb") as opened:
                opened.read(1)
        except OSError as e:
            bad.append(f"{file.name}: {e.strerror}")
    return {"files": len(files), "bad": bad}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:], dict(os.environ)))
