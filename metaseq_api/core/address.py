"""How a bound socket is written as a URL. Knows addresses of both kinds; not who listens."""

from __future__ import annotations

import ipaddress
import socket


def local_url(sock: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    host, port = sock.getsockname()[:2]
    address = ipaddress.ip_address(str(host).partition("%")[0])
    if address.is_unspecified:
        return f"http://{'127.0.0.1' if address.version == 4 else '[::1]'}:{port}"
    return f"http://{address if address.version == 4 else f'[{address}]'}:{port}"
