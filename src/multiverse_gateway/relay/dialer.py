"""Making connections to servers: the name, the address policy, the connection itself and TLS, within their times.

1. The address that is dialed is the very one that was checked, at every connect: a name that leads elsewhere a moment later leads nowhere.
   If any of its addresses is forbidden, the whole name is.
2. The addresses are dialed in turn, each with an equal part of the time that is left, until one of them answers.
3. `connect_timeout` holds for name, connection and TLS together. Time in which this process was suspended does not count: what was cut
   short by it is tried again.
4. Whatever goes wrong becomes a `Failure` that says at which step (`ConnectFailure`).
"""

import asyncio
import ipaddress
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from multiverse_gateway.core.addresses import AddressPolicy, AddressRefusal, Endpoint, refusal_of_any
from multiverse_gateway.core.failover import ConnectFailure, Failure
from multiverse_gateway.core.pauses import stopped_seconds
from multiverse_gateway.relay.receiver import unreached
from multiverse_gateway.relay.resolver import SystemResolver
from multiverse_gateway.relay.server_connection import ConnectionOwner, ServerConnection, WireSending

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_ADDRESSES: Final = 8


_TLS_PART = 0.75
"""Part of the time of one address that its TLS may take."""
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"})
"""The codes of OpenSSL for an answer that is not TLS."""


class _HungUpError(OSError):
    """The server accepted the connection, and closed it instead of answering in TLS."""


class _TLSTimeoutError(OSError):
    """The server accepted the connection, but gave no answer in TLS in time."""


class _NotDialedError(Exception):
    """The server is not dialed: its name cannot be resolved, or the address policy refuses an address."""

    def __init__(self, cause: ConnectFailure, refusal: AddressRefusal | None = None) -> None:
        self.failure = unreached(cause, refusal)


class Dialer:
    """Make the connections of a wire; `policy` is asked at every connect, `tls` replaces the context that `verify_tls` describes."""

    def __init__(
        self,
        wire: ConnectionOwner,
        *,
        policy: Callable[[], AddressPolicy],
        resolve: Resolver | None,
        connect_timeout: float,
        dns_timeout: float,
        verify_tls: bool,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._wire = wire
        self._policy = policy
        self._resolve = resolve or SystemResolver()
        self._connect_timeout = connect_timeout
        self._dns_timeout = dns_timeout
        self._verify_tls = verify_tls
        self._tls = tls

    async def dial(self, sending: WireSending) -> None:
        """Connect `sending`, or fail it with the reason."""
        began = self._wire.time()
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._connect(sending)
        except _NotDialedError as error:
            failure = error.failure
        except TimeoutError:
            stopped = stopped_seconds(began + self._connect_timeout, self._wire.time())
            if stopped and sending.connection is None and not sending.over:
                await self.dial(sending)  # the server did not get all of its time
                return
            failure = unreached(ConnectFailure.TIMEOUT)
        except ssl.SSLError as error:
            code = error.reason
            failure = unreached(ConnectFailure.NO_TLS if code in _NOT_TLS else ConnectFailure.TLS)
        except _HungUpError:
            failure = unreached(ConnectFailure.NO_TLS)
        except _TLSTimeoutError:
            failure = unreached(ConnectFailure.TLS_TIMEOUT)
        except ConnectionRefusedError:
            failure = unreached(ConnectFailure.REFUSED)
        except OSError:
            failure = unreached(ConnectFailure.OTHER)
        else:
            return
        if sending.connection is None:
            sending.fail(failure)

    async def _connect(self, sending: WireSending) -> None:
        """Resolve, check, and dial the addresses in turn, each in its part of the time that is left."""
        deadline = self._wire.time() + self._connect_timeout
        endpoint = sending.pool.endpoint
        addresses = await self._addresses(endpoint)
        tls = await self._context() if endpoint.tls else None
        failure: OSError | None = None
        for turn, address in enumerate(addresses):
            now = self._wire.time()
            seconds = (deadline - now) / (len(addresses) - turn)
            try:
                async with asyncio.timeout_at(now + seconds):
                    await self._open(sending, address, tls, seconds)
            except OSError as error:
                failure = error
                if sending.connection is None and not sending.over:
                    continue
            return
        assert failure is not None
        raise failure

    async def _open(self, sending: WireSending, address: str, tls: ssl.SSLContext | None, seconds: float) -> None:
        """Connect to one address within `seconds`; a port that is silent in TLS is noticed a little before that."""
        connection = ServerConnection(self._wire, sending)
        endpoint = sending.pool.endpoint
        name, handshake = (None, None) if tls is None else (endpoint.host, _TLS_PART * seconds)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: connection, address, endpoint.port, ssl=tls, server_hostname=name, ssl_handshake_timeout=handshake
            )
        except BaseException as error:
            if connection in self._wire.connections:  # uvloop does not call it for a connection whose dialing was canceled
                connection.connection_lost(None)
            if tls is not None and isinstance(error, ConnectionAbortedError):
                raise _TLSTimeoutError from error
            if tls is not None and isinstance(error, ConnectionResetError):
                raise _HungUpError from error
            raise

    async def resolve(self, endpoint: Endpoint) -> Sequence[str] | Failure:
        """Return the addresses of an endpoint without judging them, or why its name has none."""
        try:
            return await self._named(endpoint)
        except _NotDialedError as error:
            return error.failure

    async def _named(self, endpoint: Endpoint) -> Sequence[str]:
        try:
            ipaddress.ip_address(endpoint.host)
        except ValueError:
            return await self._resolved(endpoint)
        return [endpoint.host]

    async def _addresses(self, endpoint: Endpoint) -> Sequence[str]:
        addresses = await self._named(endpoint)
        refused = refusal_of_any(addresses, endpoint.port, self._policy(), is_opened=endpoint.is_opened)
        if refused is not None:
            raise _NotDialedError(ConnectFailure.REFUSED_ADDRESS, refused)
        return addresses[:MAX_ADDRESSES]

    async def _resolved(self, endpoint: Endpoint) -> Sequence[str]:
        began = self._wire.time()
        try:
            async with asyncio.timeout(self._dns_timeout):
                return list(dict.fromkeys(await self._resolve(endpoint.host, endpoint.port)))
        except (OSError, UnicodeError) as error:
            if isinstance(error, TimeoutError) and stopped_seconds(began + self._dns_timeout, self._wire.time()):
                return await self._resolved(endpoint)  # the resolver did not get all of its time
            raise _NotDialedError(ConnectFailure.RESOLVE) from None

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(
                _tls_context, verify=self._verify_tls
            )  # in a thread: it reads all certificates, which takes 40 ms
        return self._tls


def _tls_context(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
