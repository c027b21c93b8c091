"""Who can reach the gateway, in words for the operator, and how to open it."""

import attrs

from multiverse_gateway.core.reach import Reach
from multiverse_gateway.settings import Settings

_RUN = "multiverse-gateway run --host 0.0.0.0"


@attrs.frozen(kw_only=True)
class ReachNote:
    """What the operator reads: one sentence, what to do about it if anything, the address for others, and the command that opens it."""

    sentence: str
    remedy: str = ""
    address: str = ""
    command: str = ""


def opening_command(settings: Settings, *, has_openings: bool) -> str:
    """Return the command that lets the network reach the gateway, and the gateway reach the computers in it.

    `has_openings` says that a server uses a loopback address that was opened for it: the command keeps it reachable.

    >>> opening_command(Settings(), has_openings=True)
    'multiverse-gateway run --host 0.0.0.0 --allow-private-networks true'
    >>> opening_command(Settings(allow_private_networks="10.0.0.0/8"), has_openings=True)
    'multiverse-gateway run --host 0.0.0.0 --allow-private-networks 10.0.0.0/8,127.0.0.1/32'
    """
    allowed = settings.allow_private_networks.strip()
    if allowed.lower() in ("", "false"):
        return f"{_RUN} --allow-private-networks true"
    if allowed.lower() == "true" or not has_openings:
        return _RUN
    return f"{_RUN} --allow-private-networks {allowed.replace(' ', '')},127.0.0.1/32"


def reach_note(reach: Reach, settings: Settings, *, url: str, is_forwarded: bool, has_openings: bool) -> ReachNote | None:
    """Return what the operator reads about who can reach the gateway; `None` inside another application, which alone knows that.

    `url` is the address for others, or empty. `is_forwarded` says that a proxy or tunnel on this computer was seen to forward requests.
    """
    if reach is Reach.UNKNOWN:
        return None
    if reach is Reach.NETWORK:
        unknown = "Others use the address of this computer, or the one that its container publishes."
        remedy = "Programs there use this base URL:" if url else unknown
        where = f" at {url}" if url else ""
        return ReachNote(
            sentence=f"Every computer in your network can reach the gateway{where}.", remedy=remedy, address=url and f"{url}/v1"
        )
    if reach is Reach.PROXY or is_forwarded:
        public = settings.public_url[0].rstrip("/") if settings.public_url else url
        where = f" at {public}" if public else ""
        remedy = "Programs use this base URL:" if public else "Anyone who knows its address can reach the gateway."
        return ReachNote(
            sentence=f"Others reach the gateway through a proxy or tunnel{where}.", remedy=remedy, address=public and f"{public}/v1"
        )
    return ReachNote(
        sentence="Only this computer can reach the gateway.",
        remedy="To open it to your network, stop the gateway and start it again with:",
        command=opening_command(settings, has_openings=has_openings),
    )
