"""Starts the ranks of one machine, waits, and ends them: all of them, whatever happens to any of them.

    start    every rank as a process of its own, which the kernel kills should this one die
    watch    until a stop signal comes, a rank ends, or one has been stopped (SIGSTOP) for too long
    drain    rank 0 is told each signal and ends its requests, then dismisses the others; what is left is killed
    blame    where a rank failed: the one that failed first, not those that failed because of it; the others' stacks
             are written to the log, then all are killed

A second SIGINT kills at once. Knows processes and signals. Does not know torch, or what a rank does. Must run in the
main thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from socket import socket

from metaseq_api.errors import MetaseqApiError, RankFailed
from metaseq_api.launch.order import Order
from metaseq_api.launch.post_mortem import ASK_FOR_STACK
from metaseq_api.launch.ranks import HOST_MODULE, SETTLE_S, Child, kill, start, unnamed_file, verdict, weight
from metaseq_api.launch.rendezvous import Placement
from metaseq_api.launch.signals import Signals, heard
from metaseq_api.launch.terms import Deadline, Terms
from metaseq_api.settings import Settings

SLACK_S = 2.0
"""Units: seconds beyond the deadline of its requests in which rank 0 says its last words and dismisses the others."""
FAIL_S = 3.0
"""Units: seconds that rank 0 has to tell its clients when another rank has failed."""
DISMISS_S = 0.7
"""Units: seconds that the others have to end once rank 0 has; with SLACK_S it stays under the 5 s of one Ctrl-C."""
STACKS_S = 1.0
"""Units: seconds that ranks have to write their stacks."""
STOPPED = 0.75
"""A rank that has been stopped for so much of TIMEOUT_S is lost; looked for every eighth of it."""

logger = logging.getLogger(__name__)


def supervise(
    placement: Placement,
    num_ranks: int,
    settings: Settings,
    *,
    terms: Terms | None = None,
    sock: socket | None = None,
    module: str = HOST_MODULE,
    verbose: bool = False,
) -> int:
    """Run this machine's ranks out of `num_ranks` until they end or a signal ends them; no process is left on return.

    `sock`, the listening socket, goes to rank 0 and is closed here. Returns 0 after a stop that was asked for (130 if
    a second SIGINT cut it short), and where rank 0 ended with 0 by itself.
    Raises: what the rank that failed first said, with its exit code; RankFailed where it said nothing.
    """
    terms = terms or Terms()
    with heard(signal.SIGCHLD, signal.SIGQUIT) as signals, contextlib.ExitStack() as files:
        children: list[Child] = []
        try:
            # closed once rank 0 has it: a connection made while rank 0 is dead must not wait for an answer
            with sock or contextlib.nullcontext():
                store = unnamed_file(files)
                for rank in placement.local_ranks(num_ranks, f"file:///proc/self/fd/{store}"):
                    order = Order(
                        settings=settings,
                        rank=rank,
                        terms=terms,
                        listen_fd=sock.fileno() if sock is not None and rank.rank == 0 else None,
                        words_fd=unnamed_file(files),
                        parent_pid=os.getpid(),
                        verbose=verbose,
                    )
                    children.append(start(order, module, store))
            culprit = _watch(children, signals, settings.timeout_s)
            signals.wait(0)
            asked = bool(signals.stops)
            held = not asked and culprit.is_stopped
            if asked:
                _drain(children, signals, Deadline(terms))
            else:
                if held or culprit.process.poll() == RankFailed.exit_code:
                    _show_stacks(children, signals)
                _end(children, signals)
        finally:
            kill(children)
        if signals.hurry:
            return 128 + signal.SIGINT
        if asked:
            lost = [c for c in children if c.rank.rank == 0 and c.process.returncode == RankFailed.exit_code]
            if lost:  # it could not end its requests
                raise verdict(lost[0])
            return 0
        if held:
            raise _held_verdict(culprit, settings.timeout_s)
        if culprit.process.returncode == 0 and (culprit.rank.rank == 0 or _all_well(children)):
            return 0
        raise verdict(culprit)


def _watch(children: Sequence[Child], signals: Signals, timeout_s: float) -> Child:
    """Wait for a stop signal, a rank's end, or a rank that is held; whom to blame, the first where nobody failed."""
    held_since: dict[int, float] = {}
    while not signals.stops and all(c.alive for c in children):
        signals.wait(timeout_s / 8)
        _pass_on_quit(children, signals)
        now = time.monotonic()
        held_since = {c.rank.rank: held_since.get(c.rank.rank, now) for c in children if c.is_stopped}
        for child in children:
            if now - held_since.get(child.rank.rank, now) > STOPPED * timeout_s:
                return child
    deadline = time.monotonic() + SETTLE_S
    while not signals.stops and (left := deadline - time.monotonic()) > 0:
        ended = [c for c in children if not c.alive]
        if any(weight(c) == 3 for c in ended) or len(ended) == len(children):
            break
        signals.wait(left)
    if not signals.stops and all(weight(c) < 2 for c in children):
        # those that ended only lost another; one that is held is whom they lost
        return next((c for c in children if c.is_stopped), max(children, key=weight))
    return max(children, key=weight)


def _pass_on_quit(children: Sequence[Child], signals: Signals) -> None:
    """SIGQUIT asks for every rank's stack."""
    if signal.SIGQUIT in signals.others:
        signals.others.clear()
        for child in children:
            child.send(signal.SIGQUIT)


def _drain(children: Sequence[Child], signals: Signals, deadline: Deadline) -> None:
    """Have rank 0 end its requests and dismiss the others, on whatever node it is; what is left then is killed."""
    head = [c for c in children if c.rank.rank == 0]
    awaited, told = head or children, 0
    while any(c.alive for c in awaited) and not signals.hurry:
        for signum in signals.stops[told:]:
            deadline.hear(signum)
            for child in head:
                child.send(signal.SIGTERM if signum == signal.SIGHUP else signum)
        told = len(signals.stops)
        if (deadline.at or 0.0) + SLACK_S < time.monotonic():
            break
        signals.wait(deadline.left_s + SLACK_S)
    for child in children:
        child.send(signal.SIGTERM)  # for those that were still loading
    _await(children, signals, DISMISS_S)
    for child in children:
        if child.alive and not signals.hurry:
            logger.warning("%s did not end in time and is killed", child.name)


def _show_stacks(children: Sequence[Child], signals: Signals) -> None:
    """Have the stack of every rank in the log, also of one that is held: it goes on for as long as that takes."""
    for child in children:
        child.send(signal.SIGQUIT)
        if child.alive and child.is_stopped:
            logger.warning(
                "%s is stopped (SIGSTOP or a debugger); it goes on for its stack, then is killed", child.name
            )
            for signum in ASK_FOR_STACK[1:]:
                child.send(signum)
    _await(children, signals, STACKS_S)


def _end(children: Sequence[Child], signals: Signals) -> None:
    """A rank has failed: let rank 0 tell its clients; the others are of no more use."""
    head = [c for c in children if c.rank.rank == 0]
    for child in head:
        child.send(signal.SIGTERM)
    _await(head, signals, FAIL_S)


def _await(children: Sequence[Child], signals: Signals, seconds: float) -> None:
    """Wait until these children have ended, at most `seconds`; a second SIGINT cuts it short."""
    deadline = time.monotonic() + seconds
    while any(c.alive for c in children) and not signals.hurry and (left := deadline - time.monotonic()) > 0:
        signals.wait(left)


def _all_well(children: Sequence[Child]) -> bool:
    return all(c.process.returncode == 0 for c in children)


def _held_verdict(culprit: Child, timeout_s: float) -> MetaseqApiError:
    return RankFailed(
        f"{culprit.name} was stopped, by SIGSTOP or a debugger, and gave no sign of life for "
        f"{STOPPED * timeout_s:.1f} s or more (TIMEOUT_S); every rank's stack is above"
    )
