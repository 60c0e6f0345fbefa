"""Keeping newcomers out of a listening socket without breaking off those who are in.

Closing a listening socket resets every connection that the kernel has made and nobody has accepted: its client believes
itself connected, and sees a request cut off. So first the kernel is told to overlook connection attempts, then all that
wait are accepted, then the socket is closed; an overlooked client tries again within a second and is refused.

Knows one packet filter of Linux. Does not know servers.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26
_FLAGS, _SYN = 13, 0x02
# classic BPF over the TCP header: load the byte of flags; where SYN is in it, keep nothing of the packet, else all
_NO_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in ((0x30, 0, 0, _FLAGS), (0x45, 0, 1, _SYN), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
)


def keep_out(sock: socket.socket) -> None:
    """Have the kernel overlook whoever wants to connect; where it cannot, nothing changes."""
    program = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
    filters = struct.pack("HL", len(_NO_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):  # not allowed here, or closed before
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filters)
