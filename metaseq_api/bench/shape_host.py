"""A service of random weights: what the service's door and a rank's host are to a checkpoint.

    python -m metaseq_api.bench.shape_host '{"checkpoint": "opt-125m", ...}'

takes Settings as JSON, whose checkpoint is the shape's name, binds a free port and supervises ranks that are this
module's. Does not know what is measured.
"""

from __future__ import annotations

import json
import socket
import sys

from metaseq_api import log
from metaseq_api.errors import MetaseqApiError
from metaseq_api.launch.order import settings_from_dict
from metaseq_api.launch.rendezvous import Placement, RankInfo
from metaseq_api.launch.supervisor import supervise
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings


def run_rank(settings: Settings, rank: RankInfo, sock: socket.socket | None, terms: Terms) -> int:
    """Be one rank of random weights, as `host.run_rank` is of a checkpoint."""
    from metaseq_api import host  # the supervisor, which is this module too, does without torch
    from metaseq_api.bench.subject import Subject

    return host.run_rank(settings, rank, sock, terms, Subject(settings, settings.checkpoint.name).open)


def main() -> int:
    """Serve until stopped; the exit code."""
    settings = settings_from_dict(json.loads(sys.argv[1]))
    log.setup()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    here = Placement(kind="alone", node=socket.gethostname())
    try:
        return supervise(here, settings.model_parallel or 1, settings, sock=sock, module="metaseq_api.bench.shape_host")
    except MetaseqApiError as e:
        sys.stderr.write(f"{e}\n")
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
