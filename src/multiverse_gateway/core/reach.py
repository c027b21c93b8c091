"""Who can reach the gateway, as far as the address that it listens on shows."""

from collections.abc import Sequence
from enum import Enum
from ipaddress import ip_address


class Reach(Enum):
    """Which computers can reach the gateway."""

    UNKNOWN = "unknown"
    """It runs inside another application, which listens."""
    THIS_COMPUTER = "this computer"
    PROXY = "proxy"
    """It listens on loopback, and a proxy or tunnel on this computer forwards the requests of others."""
    NETWORK = "network"


def reach_of(listener: str | None, *, has_proxy: bool) -> Reach:
    """Return which computers can reach a gateway that listens on an address; `has_proxy` says that a proxy or a public URL is known.

    >>> reach_of("127.0.0.1", has_proxy=False), reach_of("0.0.0.0", has_proxy=False)
    (<Reach.THIS_COMPUTER: 'this computer'>, <Reach.NETWORK: 'network'>)
    """
    if listener is None:
        return Reach.UNKNOWN
    try:
        is_local = ip_address(listener).is_loopback
    except ValueError:
        return Reach.UNKNOWN
    if not is_local:
        return Reach.NETWORK
    return Reach.PROXY if has_proxy else Reach.THIS_COMPUTER


def network_url(hosts: Sequence[str], port: int, *, scheme: str = "http") -> str:
    """Return the address under which other computers reach a gateway that listens for them, or nothing if it is not known.

    >>> network_url(("192.168.1.20", "fd00::2"), 8000), network_url((), 8000)
    ('http://192.168.1.20:8000', '')
    """
    if not hosts:
        return ""
    host = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    return f"{scheme}://{host}:{port}"
