"""What the decisions of `core` depend on, derived from the settings."""

from collections.abc import Iterable
from ipaddress import ip_address

from multiverse_gateway.core.addresses import AddressPolicy
from multiverse_gateway.core.failover import RetryPolicy
from multiverse_gateway.core.health import AutoDeregister, HealthPolicy
from multiverse_gateway.core.origins import ANY, OriginPolicy
from multiverse_gateway.core.reach import Reach, reach_of
from multiverse_gateway.settings.declaration import Settings


def health_policy(settings: Settings) -> HealthPolicy:
    """Return what the health of servers depends on."""
    return HealthPolicy(
        max_consecutive_failures=settings.max_consecutive_failures,
        interval=settings.health_check_interval_seconds,
        timeout=settings.health_check_timeout_seconds,
        auto_deregister=AutoDeregister(settings.auto_deregister),
        first_byte_timeout=settings.first_byte_timeout_seconds,
    )


def retry_policy(settings: Settings) -> RetryPolicy:
    """Return what a further attempt depends on."""
    return RetryPolicy(max_retries=settings.max_retry_attempts)


def origin_policy(settings: Settings) -> OriginPolicy:
    """Return which web pages may use the gateway."""
    return OriginPolicy.parse(settings.public_url, (settings.cors_origins or (ANY,)) if settings.enable_cors else ())


def reach(settings: Settings, listener: str | None) -> Reach:
    """Return which computers can reach the gateway; a trusted proxy, a public URL and a root path stand for other computers.

    `listener` is the address that the process listens on, `None` if that is not known.
    """
    return reach_of(listener, has_proxy=bool(settings.trusted_proxies or settings.public_url or settings.root_path))


def is_private_to_this_computer(settings: Settings, listener: str | None) -> bool:
    """Return whether only this computer can reach the gateway, and only this computer's gateway uses its database.

    Gateways that share a database would each take "this computer" for their own. `listener` is that of `reach`.
    """
    is_local = reach(settings, listener) is Reach.THIS_COMPUTER
    return is_local and settings.database_url.partition("://")[0] in ("sqlite", "memory")


def address_policy(settings: Settings, *, local: Iterable[str] = (), listener: str | None = None) -> AddressPolicy:
    """Return which addresses may be dialed; the gateway's own listener never is.

    `local` are the addresses by which other machines can reach this one (`relay.local_addresses`): a listener on all addresses accepts
    connections on each of them. `listener` is the address that the process is known to listen on.
    """
    if settings.host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        hosts = {settings.host, *local}
    elif settings.host == "localhost":
        hosts = {"127.0.0.1", "::1"}
    else:
        hosts = {settings.host.strip("[]")}
    own = frozenset((host, settings.port) for host in hosts if _is_address(host))
    honors_openings = is_private_to_this_computer(settings, listener)
    return AddressPolicy.parse(settings.allow_private_networks, own=own, honors_openings=honors_openings)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
