"""How the tasks of a srun step find the port where they meet, which none of them can know beforehand.

Rank 0 takes a free port for the meeting and keeps it. The others learn it at a doorman's: a listener of rank 0's on the
first free one of a few ports that follow from the job. A port being taken, by another job's doorman or by any program,
costs a look at the next one: who asks names the step, and only that step's doorman answers. So the ports are places to
ask at, never a guess at who is there.

    asks     metaseq-api 17.0.1              job, step, how often the job was started again
    answers  17.0.1 10.0.0.7 41873           and hangs up

Knows sockets and those two lines. Does not know SLURM's variables, torch, or what happens at the meeting.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

from metaseq_api.errors import RankFailed, ResourceError, SettingsError

PATIENCE_S = 600.0
"""Units: seconds for rank 0 to come; nodes of one job may start minutes apart."""
_PORTS = range(20000, 32000)  # below those that Linux gives to outgoing connections
NUM_PLACES = 16
_ANSWER_S = 2.0
_PAUSE_S = 0.1
_SIOCGIFADDR = 0x8915


def places(name: str) -> list[int]:
    """The ports to ask at for this step, the same in every task, in order."""
    numbers = [int(n) for n in name.split(".")]
    first = numbers[0] * 64 + numbers[1] * 4 + sum(numbers[2:])
    return [_PORTS[(first + 997 * i) % len(_PORTS)] for i in range(NUM_PLACES)]


class Doorman:
    """Rank 0's: tells whoever names this step where it meets, until `close`."""

    def __init__(self, name: str, host: str, port: int, *, at: Sequence[int] | None = None) -> None:
        """Raises: ResourceError where every place is taken."""
        self._name, self._answer = name, f"{name} {host} {port}\n".encode()
        self._sock = self._take(at or places(name))
        self.port = int(self._sock.getsockname()[1])
        self._thread = threading.Thread(target=self._run, name="doorman", daemon=True)
        self._thread.start()

    def _take(self, ports: Sequence[int]) -> socket.socket:
        for port in ports:
            with contextlib.suppress(OSError):
                return socket.create_server(("", port), backlog=1024)
        raise ResourceError(
            f"the ports {', '.join(map(str, ports))} of this node are all taken; set MASTER_ADDR to its name and "
            "MASTER_PORT to a free port, in the environment of every task"
        )

    def _run(self) -> None:
        while True:
            try:
                visitor, _ = self._sock.accept()
            except OSError:  # closed
                return
            with visitor, contextlib.suppress(OSError):
                visitor.settimeout(_ANSWER_S)
                if _line(visitor) == f"metaseq-api {self._name}":
                    visitor.sendall(self._answer)

    def close(self) -> None:
        """Everybody has come."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join()


def find(name: str, node: str, *, at: Sequence[int] | None = None, patience_s: float = PATIENCE_S) -> tuple[str, int]:
    """Where the step `name` meets, as rank 0's doorman on `node` says: host and port.

    Raises: SettingsError where `node` is no name or address that this machine knows; RankFailed after patience_s.
    """
    try:
        address = socket.getaddrinfo(node, None, type=socket.SOCK_STREAM)[0][4][0]
    except (socket.gaierror, UnicodeError):
        raise SettingsError(
            f"{socket.gethostname()} does not know {node}, the node of rank 0 as SLURM calls it; "
            "set MASTER_ADDR to a name or address that every node knows"
        ) from None
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        for port in at or places(name):
            answer = _ask(str(address), port, name).split()
            if len(answer) == 3 and answer[0] == name and answer[2].isdecimal():
                return answer[1], int(answer[2])
        threading.Event().wait(_PAUSE_S)
    raise RankFailed(f"rank 0 on {node} did not come within {patience_s:.0f} s; its own log says why")


def _ask(address: str, port: int, name: str) -> str:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=_ANSWER_S) as sock:
        sock.sendall(f"metaseq-api {name}\n".encode())
        return _line(sock)
    return ""


def _line(sock: socket.socket) -> str:
    """What comes up to the first newline, if it is short."""
    data = b""
    while b"\n" not in data and len(data) < 256 and (more := sock.recv(256)):
        data += more
    return data.partition(b"\n")[0].decode("ascii", "replace")


def address_of(interface: str) -> str:
    """This machine's address on a network interface. Raises: SettingsError naming those there are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24])
        except OSError:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise SettingsError(
                f"--interface (INTERFACE) is {interface}, which has no IPv4 address on {socket.gethostname()}; "
                f"there are {names}"
            ) from None


@contextlib.contextmanager
def resolved(init: str, rank: int, interface: str | None) -> Iterator[tuple[str, int | None]]:
    """Where the ranks meet, as `parallel.join` reads it, and for rank 0 the listening socket to meet at, which it owns.

    Only `step://node/name` takes a search; it is over, and the doorman gone, when the context ends. Raises: as `find`
    and `Doorman`.
    """
    if not init.startswith("step://"):
        yield init, None
        return
    node, _, name = init.removeprefix("step://").rpartition("/")
    if rank != 0:
        host, port = find(name, node)
        yield f"tcp://{host}:{port}", None
        return
    sock = socket.create_server(("", 0), backlog=1024)
    port = sock.getsockname()[1]
    doorman = Doorman(name, address_of(interface) if interface else node, port)
    try:
        yield f"tcp://127.0.0.1:{port}", sock.detach()
    finally:
        doorman.close()
