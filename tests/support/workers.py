"""Which worker of a gateway has a connection, as Linux tells it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

Address = tuple[str, int]
"""Host (IPv4) and port, as sockets name their ends."""


def children(pid: int) -> set[int]:
    """Return the ids of a process's children; none when it has ended, or where there is no Linux to ask."""
    with suppress(OSError):
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return set()


def holder(pids: Iterable[int], end: Address, other_end: Address) -> int | None:
    """Return which of the processes has the `end` of an IPv4 connection to `other_end`, or None if none has it (any more)."""
    wanted = f"socket:[{inode(end, other_end)}]"
    return next((pid for pid in pids if wanted in open_links(pid)), None)


def inode(end: Address, other_end: Address) -> str | None:
    """Return the kernel's number of a connection's end."""
    ends = [in_hex(end), in_hex(other_end)]
    rows = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    return next((row[9] for row in rows if row[1:3] == ends), None)


def in_hex(address: Address) -> str:
    """Return an address as the kernel's list of connections writes it: the host in the machine's byte order."""
    host, port = address
    return f"{struct.unpack('=I', socket.inet_aton(host))[0]:08X}:{port:04X}"


def open_links(pid: int) -> set[str]:
    """Return what a process has open; nothing when it has ended."""
    links = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                links.add(str(link.readlink()))
    return links
