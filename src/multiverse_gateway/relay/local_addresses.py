"""The addresses by which other machines can reach this one."""

import os
import socket
from pathlib import Path

_FOREIGN = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""An address of each family that is reserved for documentation (RFC 5737, RFC 3849)."""


def local_addresses() -> frozenset[str]:
    """Return the addresses of this machine that its routes to other networks start from.

    Connecting a datagram socket only chooses a route: nothing is sent, and the call does not block.
    """
    addresses = set()
    for family, foreign in _FOREIGN:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((foreign, 9))
                addresses.add(str(probe.getsockname()[0]).partition("%")[0])
        except OSError:  # no route, or the family is disabled
            continue
    return frozenset(addresses)


_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")


def is_in_container() -> bool:
    """Return whether this process runs in a container, whose addresses mean nothing to other machines."""
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(Path(name).exists() for name in _CONTAINER_FILES)
