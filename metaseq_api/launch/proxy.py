"""One address in front of the members of a service: HAProxy, told by the registry who is there.

Reads the members' records again and again and gives each slot of HAProxy's its address and state: `ready` takes
requests, `draining` none that are new, whatever else stands empty. That a member which says it is ready truly is,
HAProxy finds out itself, by asking for /ready. A registry that cannot be read changes nothing. Knows records and one
child process. Does not know SLURM, or keys: members ask for those, and the client's is passed on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from metaseq_api.errors import PortInUse, RankFailed, ServiceError, SettingsError
from metaseq_api.launch import haproxy
from metaseq_api.launch.haproxy import EMPTY, Runtime, Slot
from metaseq_api.launch.recorder import Recorder, reached_at
from metaseq_api.launch.registry import Record, Registry
from metaseq_api.launch.signals import Signals, heard
from metaseq_api.launch.standing import STALE_S
from metaseq_api.launch.terms import Deadline, Terms

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Units: seconds between two looks into the registry."""
GONE_S = 5.0
"""Units: seconds without the service's folder after which the proxy ends: a name that is submitted again is gone for an
instant only."""
START_S = 10.0
"""Units: seconds that HAProxy has to start."""
_STATES: dict[str, haproxy.State] = {"ready": "ready", "draining": "drain"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What one proxy is told."""

    name: str
    host: str
    port: int
    node: str
    """How others call this machine."""
    job: str | None
    program: str


def slots_of(records: Sequence[Record], now: float, resolve: Callable[[str], str]) -> dict[int, Slot]:
    """What each member's slot is to be. Units: now in seconds since 1970.

    A member that has gone silent is left out, for its port may be another's by now; where all have, the disk between is
    at fault, and their last word still counts.
    """
    alive = [r for r in records if now - r.heartbeat < STALE_S]
    found = {}
    for r in alive or records:
        state = _STATES.get(r.state, "maint")
        if state != "maint" and (address := resolve(r.host)):
            found[r.member] = Slot(state=state, address=address, port=r.port, at_once=r.at_once)
    return found


class Addresses:
    """Of nodes, each looked up until it is found once: a name server that fails later takes nobody out."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, host: str) -> str:
        """The address of a name; "" where it has none yet."""
        if host not in self._known:
            try:
                found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            except OSError:
                log.warning("%s has no address; whoever is there is left out", host)
                return ""
            self._known[host] = str(min(found, key=lambda info: info[0] != socket.AF_INET)[4][0])
        return self._known[host]


def serve(registry: Registry, front: Front, terms: Terms, told: Callable[[Record], None] = lambda r: None) -> int:
    """Be the proxy of a service until told to end, or the service is stopped; the exit code. `told` hears where it is.

    Raises: ServiceError, SettingsError, PortInUse, ResourceError; RankFailed where HAProxy ended by itself.
    """
    check_free(registry, front.name, front.job)
    with heard(signal.SIGCHLD) as signals:
        sock = _bind(front.host, front.port)
        with sock:  # HAProxy has its own; while ours was open, nobody would be refused at its end
            record = _record(front, sock)
            process, runtime = haproxy.start(front.program, sock, _num_slots(registry, front.name))
        with contextlib.closing(runtime), _ended(process):
            recorder = Recorder(registry.proxy_file(front.name), record)
            try:
                _wait_until_it_answers(process, runtime)

                def begun() -> None:
                    recorder.ready()
                    told(record)

                reason = _watch(registry, front.name, process, runtime, signals, begun)
                recorder.draining(reason)
                _end(process, signals, Deadline(terms), reason)
            except BaseException as e:
                recorder.ended(str(e) or type(e).__name__, RankFailed.exit_code)
                raise
            if not _is_forgotten(registry, front.name):
                recorder.ended(reason, 0)
    return 0


def check_free(registry: Registry, name: str, job: str | None) -> None:
    """Refuse a second proxy of a service. Raises: ServiceError, also where there is no such service."""
    if registry.submission(name) is None and not registry.records(name):
        known = ", ".join(registry.names()) or "none"
        raise ServiceError(f"there is no service {name} in {registry.folder}; there are: {known}")
    other = registry.proxy(name)
    if other is None or other.state == "ended" or time.time() - other.heartbeat > STALE_S:
        return
    if job is None or other.job != job:
        where = other.url or "queued"
        raise ServiceError(f"{name} has a proxy already, {where} (job {other.job or '-'}); end that one first")


def _num_slots(registry: Registry, name: str) -> int:
    submission = registry.submission(name)
    return max(haproxy.MIN_SLOTS, 2 * (submission.replicas if submission else 0))


def _record(front: Front, sock: socket.socket) -> Record:
    host, port = reached_at(sock, front.node)
    now = time.time()
    return Record(
        name=front.name,
        state="starting",
        heartbeat=now,
        started=now,
        job=front.job,
        node=front.node,
        host=host,
        port=port,
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
    )


def _bind(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        sock = socket.socket(family, kind, proto)
    except OSError:
        raise SettingsError(f"--host {host} is not an address of this machine; use 127.0.0.1 or 0.0.0.0") from None
    try:
        if port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier run on their way out
        sock.bind(address)
        sock.listen(1024)
    except OSError as e:
        sock.close()
        raise PortInUse(
            f"cannot listen on port {port} of {host} ({e.strerror}); choose another with --port (0 takes a free one)"
        ) from None
    return sock


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """See to it that HAProxy has ended when the context has."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], runtime: Runtime) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError):
            if runtime.say("show info"):
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RankFailed(f"HAProxy did not start (exit code {process.poll()}); what it says is above")
        time.sleep(0.02)


def _watch(
    registry: Registry,
    name: str,
    process: subprocess.Popen[bytes],
    runtime: Runtime,
    signals: Signals,
    begun: Callable[[], None],
) -> str:
    """Keep the slots as the registry has the members, until there is a reason to end, which is returned.

    `begun` is called once the members that are there have been let in: nobody shall be told the address before.
    """
    told = False
    known: dict[int, Slot] = {}
    words: dict[int, Record] = {}  # the last of each member: a file that cannot be read now says nothing new
    addresses, seen = Addresses(), time.monotonic()
    while True:
        if signals.stops:
            return signal.Signals(signals.stops[0]).name
        if process.poll() is not None:
            raise RankFailed(f"HAProxy ended by itself (exit code {process.returncode}); what it says is above")
        now = time.monotonic()
        if not _is_forgotten(registry, name):
            seen = now
            words |= {r.member: r for r in registry.records(name)}
            known = _apply(runtime, known, slots_of(list(words.values()), time.time(), addresses.of))
        elif now - seen > GONE_S:
            return f"{name} was stopped"
        if not told:
            told = True
            begun()
        signals.wait(LOOK_S)


def _is_forgotten(registry: Registry, name: str) -> bool:
    """Whether the service's folder is not there, though the registry's is."""
    try:
        os.stat(registry.path(name))
    except FileNotFoundError:
        return registry.folder.is_dir()
    except OSError:  # a disk that does not answer
        return False
    return False


def _apply(runtime: Runtime, known: dict[int, Slot], wanted: dict[int, Slot]) -> dict[int, Slot]:
    """Tell HAProxy what is new; what it knows now. Where that fails, it is told again at the next look."""
    now = dict(known)
    for number in sorted({*known, *wanted}):
        old, new = known.get(number, EMPTY), wanted.get(number, EMPTY)
        if new.state == "maint":  # the address stays, for whoever comes back to it
            new = dataclasses.replace(old, state="maint")
        try:
            said = [answer for command in haproxy.changes(number, old, new) if (answer := runtime.say(command))]
        except OSError as e:
            log.warning("HAProxy's socket does not answer (%s); it is told again", e)
            return now
        if [s for s in said if "changed from" not in s and "no need to change" not in s]:
            log.warning("HAProxy about member %d: %s", number, "; ".join(said))
        if new != old:
            log.info("member %d: %s %s:%d", number, new.state, new.address, new.port)
        now[number] = new
    return now


def _end(process: subprocess.Popen[bytes], signals: Signals, deadline: Deadline, reason: str) -> None:
    """Refuse whoever is new, and let the others go on until the deadline."""
    process.send_signal(signal.SIGUSR1)
    told = 0
    if not signals.stops:
        deadline.hear(signal.SIGTERM)
    while not signals.hurry:
        for signum in signals.stops[told:]:
            deadline.hear(signum)
        if told != len(signals.stops) or not told:
            log.info("%s: nobody new is let in; what runs has %.1f s", reason, deadline.left_s)
        told = len(signals.stops)
        if process.poll() is not None or deadline.left_s == 0:
            break
        signals.wait(deadline.left_s)
    if process.poll() is None:
        log.warning("%s: what still runs is cut off", reason)
