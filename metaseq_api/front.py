"""The front end's life: a process that has HTTP, and asks the engine over a line; started by `launch.front_end`.

    python -m metaseq_api.front        reads its FrontOrder from standard input

It makes its app and its tokenizer while rank 0 still loads, listens when told, and ends when told, or when rank 0 has
gone. No torch is loaded here, and no signal ends it: rank 0 hears them and says what to do.

Puts `server` and the tokenizer together, as `rank` does a rank; holds no logic of theirs.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from typing import Any, NoReturn

from metaseq_api import log
from metaseq_api.core.line import Line
from metaseq_api.core.plain import error_to_plain
from metaseq_api.errors import MetaseqApiError
from metaseq_api.launch.child import die_with_parent, ignore_stops, settle
from metaseq_api.launch.front_end import HELD_BACK, FrontOrder
from metaseq_api.server.app import create_app
from metaseq_api.server.remote import Facts, RemoteEngine
from metaseq_api.server.run import Server
from metaseq_api.tokenizer import Tokenizer, find_files


class Front:
    """Hears one line and serves, both in the caller's thread: what a step told goes out without a change of threads."""

    def __init__(self, order: FrontOrder, line: Line) -> None:
        settings, facts = order.settings, Facts(**order.facts)
        self._line = line
        files = find_files(settings.checkpoint, settings.bpe_vocab, settings.bpe_merges)
        self.engine = RemoteEngine(line, facts, Tokenizer.load(*files, model_vocab_size=facts.vocab_size))
        self._app = create_app(self.engine, settings)
        self._sock = socket.socket(fileno=order.listen_fd)
        self._server: Server | None = None
        self._stopped = False

    def run(self) -> None:
        """Serve when told, until told otherwise, or rank 0 has gone."""
        for message in self._line.messages():
            self._handle(*message)
            if self._server is not None or self._stopped:
                break
        if self._server is not None:
            self._server.attend(self._line.fileno(), self._hear)
            self._hear()  # of what came along with that message nothing else would tell
            self._server.run()

    def _hear(self) -> bool:
        """Handle what has come; whether there may be more."""
        goes_on = False
        try:
            heard = self._line.heard()
            for message in heard or ():
                self._handle(*message)
            goes_on = heard is not None
        finally:
            if not goes_on:  # whatever happened: nobody waits for an answer that does not come
                self.engine.lose()
                self._line.hang_up()
                self._stop(0)
        return goes_on

    def _handle(self, what: str, *of: Any) -> None:
        if what == "serve":
            self._serve()
        elif what == "stop":
            self._stop(*of)
        elif self._server is None:
            assert what == "hang_up", what
        elif what == "hang_up":
            self._server.hang_up()
        else:
            self.engine.hear(what, *of)

    def _serve(self) -> None:
        """Listen, or say why not."""
        try:
            self._server = Server(self._app, self._sock)
        except MetaseqApiError as e:
            self._line.send("refused", error_to_plain(e))  # and rank 0 ends this process
        else:
            self._line.send("serving")

    def _stop(self, grace_s: float) -> None:
        self._stopped = True
        if self._server is not None:
            self._server.stop(grace_s)


def main() -> NoReturn:
    """Be the front end that the order on standard input says."""
    try:
        order = FrontOrder.from_json("" if sys.stdin.isatty() else sys.stdin.read())
    except (ValueError, KeyError, TypeError):
        sys.exit("metaseq-api: error: this module is started by metaseq-api-local, not by hand")
    die_with_parent(order.parent_pid)
    ignore_stops()
    faulthandler.register(signal.SIGQUIT, all_threads=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    log.setup("front", verbose=order.verbose)
    line = Line(socket.socket(fileno=order.line_fd))
    try:
        front = Front(order, line)
        settle()
        front.run()
    except MetaseqApiError as e:  # rank 0 hears it when it says `serve`
        line.send("refused", error_to_plain(e))
        list(line.messages())  # until rank 0 has heard it, and hangs up
    os._exit(0)  # no thread may hold it


if __name__ == "__main__":
    main()
