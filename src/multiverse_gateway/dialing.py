"""How servers are dialed: one wire and one HTTP client, made from the settings in the same way for a gateway and for a command."""

from collections.abc import Callable
from ipaddress import ip_address

import httpx2

from multiverse_gateway.core.addresses import AddressPolicy
from multiverse_gateway.core.reach import Reach
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import Client
from multiverse_gateway.relay.dialer import Resolver
from multiverse_gateway.relay.local_addresses import is_in_container, local_addresses
from multiverse_gateway.relay.requests import USER_AGENT
from multiverse_gateway.relay.transport import WireTransport
from multiverse_gateway.relay.wire import Wire
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.policies import address_policy, reach


def wire_of(settings: Settings, *, policy: Callable[[], AddressPolicy], resolve: Resolver | None = None) -> Wire:
    """Return a wire with the timeouts and the TLS of the settings; `policy` is asked at each connect."""
    return Wire(
        policy=policy,
        resolve=resolve,
        connect_timeout=settings.connect_timeout_seconds,
        dns_timeout=settings.dns_timeout_seconds,
        write_timeout=settings.write_timeout_seconds,
        verify_tls=settings.verify_backend_tls,
    )


def client_over(transport: httpx2.AsyncBaseTransport) -> Client:
    """Return the client of the gateway's own requests: it follows no redirect, uses no proxy, and leaves timeouts to its callers."""
    return httpx2.AsyncClient(
        transport=transport,
        headers={"user-agent": USER_AGENT, "accept-encoding": "identity"},
        follow_redirects=False,
        trust_env=False,
        timeout=None,
    )


class Network:
    """How a gateway reaches servers: its wire, its HTTP client over that wire, and the addresses that it may dial.

    Nothing is opened before the first request; `aclose` closes all connections.
    """

    def __init__(self, settings: Settings, *, resolve: Resolver | None = None, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._transport = transport
        self._opened_clients: dict[str, Client] = {}
        self.listener: str | None = None
        """The address that the process listens on, as far as the program that runs the gateway said so (`listen_on`)."""
        self.network_hosts: tuple[str, ...] = ()
        """The addresses by which other computers may reach this one, IPv4 first; none in a container."""
        self.address_policy: AddressPolicy = address_policy(settings)
        self.wire = wire_of(settings, policy=lambda: self.address_policy, resolve=resolve)
        self.http = client_over(transport if transport is not None else WireTransport(self.wire))

    def learn_local_addresses(self) -> None:
        """Find out the addresses of this machine, on which the gateway itself listens: it never dials its own listener."""
        local = local_addresses()
        self.address_policy = address_policy(self._settings, local=local, listener=self.listener)
        self.network_hosts = () if is_in_container() else tuple(sorted(local, key=lambda address: (":" in address, address)))

    @property
    def reach(self) -> Reach:
        """Return which computers can reach the gateway, as far as its listener and its settings show."""
        return reach(self._settings, self.listener)

    @property
    def hosts_for_others(self) -> tuple[str, ...]:
        """Return the addresses under which other computers may reach the gateway, the best first; none if they are not known."""
        if self.reach is not Reach.NETWORK or self.listener is None:
            return ()
        return self.network_hosts if ip_address(self.listener).is_unspecified else (self.listener,)

    def listen_on(self, address: str) -> None:
        """Learn the address of the socket that the process listens on; a gateway inside another application never learns it.

        Call it before the gateway starts.
        """
        self.listener = address

    def client_for(self, server: Server) -> Client:
        """Return the HTTP client for the gateway's own requests to a server; only that one may dial what was opened for the server."""
        opened = server.opened_address
        if opened is None or self._transport is not None:
            return self.http
        if opened not in self._opened_clients:
            self._opened_clients[opened] = client_over(WireTransport(self.wire, opened_address=opened))
        return self._opened_clients[opened]

    async def aclose(self) -> None:
        """Close every connection to servers, idle or not."""
        for client in (self.http, *self._opened_clients.values()):
            await client.aclose()
        await self.wire.aclose()
