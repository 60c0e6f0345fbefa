"""How a rank behaves as a process: the first thing it does, and the last.

    python -m metaseq_api.launch.child MODULE [what to show in a process list]

reads its Order from standard input and calls `MODULE.run_rank(settings, rank_info, sock) -> exit code`, whose module is
imported only after the process is tied to its parent. In a child of the supervisor SIGINT and SIGHUP do nothing (Ctrl-C
is the supervisor's to act on) and SIGTERM ends the process at once; rank 0 may install a handler that ends its requests
first, and must bear to receive SIGTERM twice.

Knows signals and the Order. Does not know what a rank does, nor torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from metaseq_api import log
from metaseq_api.errors import MetaseqApiError, SettingsError
from metaseq_api.launch.order import Order, write_last_words
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.settings import Settings

_PR_SET_PDEATHSIG = 1


def child_setup(parent_pid: int) -> None:
    """Tie this process to its parent, even one that is killed with SIGKILL, and leave Ctrl-C to it."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends at once, also inside a collective that Python cannot interrupt
    for signum in (signal.SIGINT, signal.SIGHUP):  # from a terminal they reach the whole family
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before the line above took hold
        os._exit(1)


def rank_setup(rank: int, *, parent_pid: int | None, grace_s: float) -> None:
    """The manners of a rank that srun or torchrun started, where no supervisor of ours stands above it.

    Every rank gets SIGTERM at once there. A follower outlives it by `grace_s`, so that rank 0 can still answer with it;
    in rank 0 SIGINT means what SIGTERM means, which is its caller's to handle.
    """
    if parent_pid is not None:
        die_with_parent(parent_pid)
    if rank == 0:
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a thread that waits for the signal, since a Python handler would not run while a collective blocks this one
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def follow() -> None:
        signal.sigwait({signal.SIGTERM})
        threading.Event().wait(grace_s)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=follow, name="sigterm", daemon=True).start()


def inherit() -> Order:
    """The Order of this child; the process is tied to its supervisor on return.

    Raises: SettingsError where no supervisor stands at the other end.
    """
    try:
        order = Order.from_json("" if sys.stdin.isatty() else sys.stdin.read())
    except (ValueError, KeyError, TypeError):
        raise SettingsError("this module is started by metaseq-api-local, not by hand") from None
    child_setup(order.parent_pid)
    return order


def be(
    module: str, settings: Settings, rank: RankInfo, sock: socket.socket | None, tell: Callable[[MetaseqApiError], None]
) -> NoReturn:
    """Be this rank until it ends, and the process with it; `tell` gets the error that the user can act on."""
    try:
        code = int(importlib.import_module(module).run_rank(settings, rank, sock))
    except MetaseqApiError as e:
        tell(e)
        code = e.exit_code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:  # the rim of a rank: what nobody foresaw is told with its stack, and ends the job
        logging.getLogger(__name__).exception("rank %d failed", rank.rank)
        code = MetaseqApiError.exit_code
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # no thread and no library's teardown may hold a rank that has ended


def main() -> NoReturn:
    """Be the rank that the Order on standard input says."""
    try:
        order = inherit()
    except SettingsError as e:
        sys.exit(f"metaseq-api: error: {e}")
    log.setup(order.rank.rank, verbose=order.verbose)
    sock = None if order.listen_fd is None else socket.socket(fileno=order.listen_fd)

    def tell(error: MetaseqApiError) -> None:
        # the supervisor prints the words of the rank that failed first, so that those of the others do not bury them
        try:
            write_last_words(order.words_fd, error)
        except OSError:  # a full disk
            sys.stderr.write(f"rank {order.rank.rank}: {error}\n")

    be(sys.argv[1], order.settings, order.rank, sock, tell)


if __name__ == "__main__":
    main()
