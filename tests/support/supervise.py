"""`python -m support.supervise NUM_RANKS GRACE_S`: dummy ranks under the real supervisor, as from the door."""

from __future__ import annotations

import socket
import sys

from metaseq_api import log
from metaseq_api.errors import MetaseqApiError
from metaseq_api.launch.rendezvous import Placement
from metaseq_api.launch.supervisor import supervise
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings


def main() -> int:
    num_ranks, grace_s = int(sys.argv[1]), float(sys.argv[2])
    log.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    try:
        return supervise(
            Placement(kind="alone", node="here"),
            num_ranks,
            Settings(model_parallel=num_ranks, timeout_s=2.0),
            terms=Terms(grace_s=grace_s),
            sock=sock,
            module="support.dummy_host",
        )
    except MetaseqApiError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
