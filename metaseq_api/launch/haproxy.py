"""HAProxy: the configuration of one proxy as text, how it is started, and what is told to it while it runs.

Members have slots, numbered as they are, that stand empty until the runtime socket gives them an address: whoever joins
or leaves costs no restart, and no connection. Retried is what surely was not begun: no connection came about, or the
member said so (status 425, asked for by a header). A connection that broke without an answer is not: the request may
be why. Knows HAProxy's words since 2.4. Does not know the registry.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from typing import Literal

from metaseq_api.errors import ResourceError
from metaseq_api.launch.child import die_with_parent

MIN_SLOTS = 64
TIMEOUT_S = 5.0
"""Units: seconds that HAProxy has to answer on its socket."""
_PLACES = ("haproxy", "/usr/sbin/haproxy", "/usr/local/sbin/haproxy")

State = Literal["ready", "drain", "maint"]

_CONFIG = """\
global
    stats socket sockpair@{runtime_fd} level admin
    tune.bufsize {bufsize} # a request that is sent elsewhere must fit

defaults
    mode http
    timeout connect 2s
    timeout http-request 60s
    timeout http-keep-alive 60s
    timeout client 1d # a request may take its time: a lost node is noticed by keep-alive packets
    timeout server 1d
    timeout queue 1h
    timeout check 8s
    option clitcpka
    option srvtcpka
    srvtcpka-idle 10s
    srvtcpka-intvl 5s
    srvtcpka-cnt 3
    option http-server-close # a connection for each request: none dies in a pool while it is chosen
    option http-buffer-request # only one that has come whole before it is sent can be sent again
    option http-no-delay # tokens, as they come
    option abortonclose # a client that left is not worked for
{errors}

frontend door
    bind fd@{fd}
    http-request set-header X-Retry-Elsewhere 1
    default_backend members

backend members
    balance leastconn
    option httpchk GET /ready
    http-check expect status 200
    retries 3
    option redispatch 1
    retry-on conn-failure 425
    http-response set-status 503 if {{ status 425 }}
    server-template member 0-{last} 127.0.0.1:1 check inter 1s fastinter 250ms downinter 500ms rise 1 fall 2 \
on-error fastinter observe layer4 disabled
"""
_BUFSIZE = 256 << 10
_ERRORS = {
    400: ("invalid_request_error", "bad_request", "the request is not HTTP as this proxy reads it"),
    408: ("invalid_request_error", "bad_request", "the request did not come within 60 seconds"),
    500: ("server_error", "internal_error", "the proxy failed; send the request again"),
    502: (
        "server_error",
        "member_lost",
        "the member that worked on this request was lost; it was not tried elsewhere, for it may be the reason: "
        "send it again if it is not",
    ),
    503: ("server_error", "no_member", "no member of this service is ready; try again later"),
    504: ("timeout_error", "member_silent", "the member that worked on this request has said nothing for a day"),
}
_RETRY_AFTER = {502: 1, 503: 5}
"""Units: seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one slot is to be. Units: at_once in requests; more wait in the proxy. 0 does not say."""

    state: State = "maint"
    address: str = ""
    port: int = 0
    at_once: int = 0


EMPTY = Slot()


def find(named: str | None = None) -> str:
    """HAProxy's program. Raises: ResourceError where there is none."""
    for place in [named] if named else _PLACES:
        if found := shutil.which(place):
            return found
    raise ResourceError(
        f"{named or 'haproxy'} is not found here; have it installed (Debian: apt-get install haproxy), or name the "
        "program with --haproxy FILE"
    )


def config(*, listen_fd: int, runtime_fd: int, slots: int) -> str:
    """The text of its configuration; it listens on one inherited socket and hears commands by another, `Runtime`'s."""
    return _CONFIG.format(
        runtime_fd=runtime_fd, bufsize=_BUFSIZE, fd=listen_fd, last=slots - 1, errors="\n".join(map(_error, _ERRORS))
    )


def _error(status: int) -> str:
    kind, code, message = _ERRORS[status]
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    after = f" hdr Retry-After {_RETRY_AFTER[status]}" if status in _RETRY_AFTER else ""
    return f"    http-error status {status} content-type application/json string '{body}'{after}"


def changes(number: int, old: Slot, new: Slot) -> list[str]:
    """What to say to its socket so that a slot becomes another. Requests that run on the old address go on there."""
    if old == new:
        return []
    server = f"members/member{number}"
    said = []
    if new.state != "maint" and (old.address, old.port) != (new.address, new.port):
        if old.state != "maint":
            said.append(f"set server {server} state maint")
        said.append(f"set server {server} addr {new.address} port {new.port}")
    if new.state != "maint" and old.at_once != new.at_once:
        said.append(f"set maxconn server {server} {new.at_once}")
    if said or old.state != new.state:
        said.append(f"set server {server} state {new.state}")
    return said


def start(program: str, door: socket.socket, slots: int) -> tuple[subprocess.Popen[bytes], Runtime]:
    """Start it on a bound socket. It needs no file: its configuration is in memory, its commands come by a pair."""
    ours, theirs = socket.socketpair()
    with theirs, open(os.memfd_create("haproxy.cfg"), "w+b") as file:
        file.write(config(listen_fd=door.fileno(), runtime_fd=theirs.fileno(), slots=slots).encode())
        file.seek(0)
        process = subprocess.Popen(
            [program, "-db", "-f", f"/dev/fd/{file.fileno()}"],
            stdin=subprocess.DEVNULL,
            pass_fds=[door.fileno(), theirs.fileno(), file.fileno()],
            start_new_session=True,  # Ctrl-C in a terminal is ours to act on
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    return process, Runtime(ours)


class Runtime:
    """Where it hears commands: each comes by a connection of its own, handed over through the pair."""

    def __init__(self, pair: socket.socket) -> None:
        self._pair = pair

    def close(self) -> None:
        self._pair.close()

    def say(self, command: str) -> str:
        """One command; the answer, "" for most that did what they were told. Raises: OSError."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._pair, [b"\0"], [theirs.fileno()])
            ours.settimeout(TIMEOUT_S)
            ours.sendall(command.encode() + b"\n")
            said = bytearray()
            while more := ours.recv(1 << 16):
                said += more
        return said.decode(errors="replace").strip()
