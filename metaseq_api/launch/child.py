"""How a rank behaves as a process: the first thing it does, and the last.

    python -m metaseq_api.launch.child MODULE [what to show in a process list]

reads its Order from standard input and calls `MODULE.run_rank(settings, rank_info, sock, terms) -> exit code`, whose
module is imported only after the process is tied to its parent.

Signals: while it starts and loads, a stop signal ends a rank at once. From then on rank 0 hears them (`signals`), and
the others leave them to it (`ignore_stops`): SLURM sends them to every process of a step, and requests can
only be ended with every rank's help. Ctrl-C in a terminal reaches the whole family, so followers never act on it.
SIGQUIT writes the stack of the main thread to the log and does nothing else.

Knows signals and the Order. Does not know what a rank does, nor torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from metaseq_api import log
from metaseq_api.errors import MetaseqApiError, SettingsError
from metaseq_api.launch.order import Order, write_last_words
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.signals import STOPS
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings

_PR_SET_PDEATHSIG = 1


def child_setup(rank: int, parent_pid: int | None) -> None:
    """The manners of a rank; `parent_pid` is who takes it along, if anybody: a supervisor, torchrun's agent."""
    if parent_pid is not None:
        die_with_parent(parent_pid)
    # rank 0 has more threads than are ever shown, and its main one, which computes, would come last
    faulthandler.register(signal.SIGQUIT, all_threads=rank != 0)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)  # at once, also inside a collective that Python cannot interrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL if rank == 0 else signal.SIG_IGN)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if rank == 0 and parent_pid is None else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def settle() -> None:
    """Have the garbage collector look no more at what is there by now: it lives as long as this process.

    Of 7 s in which rank 0 served 256 streams it took 200 to 280 ms, up to 190 at once; 15 to 21 after this, up to 10
    (2026-11-28).
    """
    gc.collect()
    gc.freeze()


def ignore_stops() -> None:
    """For a follower that has loaded: rank 0 dismisses it, or is lost, which the next collective tells."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before the line above took hold
        os._exit(1)


def inherit() -> Order:
    """The Order of this child; the process is tied to its supervisor on return.

    Raises: SettingsError where no supervisor stands at the other end.
    """
    try:
        order = Order.from_json("" if sys.stdin.isatty() else sys.stdin.read())
    except (ValueError, KeyError, TypeError):
        raise SettingsError("this module is started by metaseq-api-local, not by hand") from None
    child_setup(order.rank.rank, order.parent_pid)
    return order


def be(
    module: str,
    settings: Settings,
    rank: RankInfo,
    sock: socket.socket | None,
    terms: Terms,
    tell: Callable[[MetaseqApiError], None],
) -> NoReturn:
    """Be this rank until it ends, and the process with it; `tell` gets the error that the user can act on."""
    try:
        code = int(importlib.import_module(module).run_rank(settings, rank, sock, terms))
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

    be(sys.argv[1], order.settings, order.rank, sock, order.terms, tell)


if __name__ == "__main__":
    main()
