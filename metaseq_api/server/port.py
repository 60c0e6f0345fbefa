"""Taking a port, and why one cannot be taken.

Knows addresses. Does not know who listens, nor Flask or waitress: a door binds before it has loaded anything else.
"""

from __future__ import annotations

import errno
import socket

from metaseq_api.errors import PortInUse, SettingsError


def bind(host: str, port: int) -> socket.socket:
    """Take a port, without listening yet: clients are refused until `Server` is made. Port 0 takes a free one.

    Raises: PortInUse; SettingsError where this machine has no such address, or the port needs privileges.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise _no_address(host) from None
    family, kind, proto, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, kind, proto)
    try:
        try:
            sock.bind(address)
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            # Perhaps only connections of an earlier run, on their way out; this way they are no hindrance. Not tried
            # first, for two sockets that both reuse an address, neither listening yet, would get the same port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as e:
        sock.close()
        raise explain(e, host, port) from None
    return sock


def explain(error: OSError, host: str, port: int) -> PortInUse | SettingsError:
    """What the user can do about an address that cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} on {host} is taken by another program; stop that or choose another with --port "
            "(--port 0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return SettingsError(f"port {port} needs privileges this user lacks; choose one from 1024 up with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return _no_address(host)
    return SettingsError(f"cannot listen on port {port} of {host} ({error.strerror}); try other --host and --port")


def _no_address(host: str) -> SettingsError:
    return SettingsError(f"--host {host} is not an address of this machine; use 127.0.0.1 or 0.0.0.0")
