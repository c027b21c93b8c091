"""The three things that can be replaced: how a server is chosen, how its health is probed, where the registry lives.

Each is named in the settings by its entry point, or passed to `create_app` as an instance.
"""

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from inspect import isfunction
from typing import Any, Protocol, runtime_checkable

import attrs
import httpx2

from multiverse_gateway.core.activity import Running
from multiverse_gateway.core.addresses import AddressRefusal
from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.failover import ConnectFailure
from multiverse_gateway.core.health import Health
from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import ClientKey, HostId, Server, ServerId, WallLink
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import Usage

Client = httpx2.AsyncClient


class LoadView(Protocol):
    """What a balancer may know about the load of this process."""

    def in_flight(self, server_id: ServerId) -> int:
        """Return the number of attempts that run on the server now."""
        ...

    def host_in_flight(self, host_id: HostId) -> int:
        """Return the number of attempts that run on all servers of the host now: its models share one computer."""
        ...

    def latency(self, server_id: ServerId) -> float | None:
        """Return the moving average of seconds to the first byte, failures counted as slow; `None` before the first attempt.

        It decays while nothing is measured.
        """
        ...

    def traffic_share(self, server_id: ServerId) -> float:
        """Return the part of its usual traffic that the server should get, 0.25 to 1: less than 1 during its slow start."""
        ...

    def share(self, server_id: ServerId) -> float:
        """Return `traffic_share`. Deprecated: this old name goes with the next release."""
        ...


class Balancer(Protocol):
    """Choose one of several usable servers. Called on the event loop for every attempt: must neither block nor raise."""

    def pick(self, servers: Sequence[Server], load: LoadView, request: Envelope) -> Server:
        """Return one of `servers`, which is never empty; its order is stable between calls with the same servers."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """What a balancer may do besides: tell the figures that it compares, so that people see why a server was chosen."""

    def scores(self, servers: Sequence[Server], load: LoadView) -> Mapping[ServerId, float]:
        """Return the figure of each server; the least is the best."""
        ...


class ServerUnreachable(httpx2.ConnectError):
    """The `Client` of a probe could not connect to the server; `cause` says at what it failed.

    `refusal` says why the gateway may not connect to this address, if that is the cause.
    """

    def __init__(self, message: str, *, cause: ConnectFailure, refusal: AddressRefusal | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.refusal = refusal


class ProbeProblem(StrEnum):
    """What is wrong with a server's answer to a probe, or with the way in which it failed to answer."""

    KEY_MISSING = "key_missing"
    KEY_REFUSED = "key_refused"
    UNSENDABLE_KEY = "unsendable_key"
    ACCESS_REFUSED = "access_refused"
    REDIRECT = "redirect"
    BUSY = "busy"
    IDLE_TUNNEL = "idle_tunnel"
    NO_TLS = "no_tls"
    NOT_FOUND = "not_found"
    UNKNOWN_MODEL = "unknown_model"
    STATUS = "status"
    NOT_JSON = "not_json"
    NO_LIST = "no_list"
    NO_CHOICES = "no_choices"
    COMPRESSED = "compressed"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    BROKEN = "broken"


MAX_PROBE_BYTES = 1 << 20
"""The largest answer that a probe reads."""


class UnusableAnswer(httpx2.RemoteProtocolError):
    """The `Client` of a probe rejects the server's answer because it is `COMPRESSED` or `TOO_LARGE` (more than `MAX_PROBE_BYTES`)."""

    def __init__(self, message: str, *, problem: ProbeProblem) -> None:
        super().__init__(message)
        self.problem = problem


class ProbeStep(StrEnum):
    """A step of a connection test, in the order in which they are taken.

    The URL is read, its host name is resolved, the address is judged, a connection is made, the server lets the gateway in, its answer is
    what was asked for, it offers the model, and the model answers a chat completion. A probe need not take the last two.
    """

    URL = "url"
    NAME = "name"
    ADDRESS = "address"
    CONNECTION = "connection"
    ACCESS = "access"
    ANSWER = "answer"
    MODEL = "model"
    CHAT = "chat"


@attrs.frozen(kw_only=True)
class ProbeResult:
    """What one probe of one server found.

    `checked_at` is epoch seconds, `duration` seconds. `reason` is one sentence in words for people, without secrets and without
    anything that the server sent; `None` when the probe passed. `warning` is a sentence about a probe that passed nevertheless.
    `models` are the names that the server listed, at most 1,000. `let_in`: the server also accepted a request with its key, if it
    needs one. `timed_out`: there was no answer within the time allowed. `lacks_chat`: the server was asked to chat and has no chat. The
    gateway sets `is_busy` if bytes of other answers of the server arrived meanwhile, and `running` to the oldest attempt that runs on it.
    `owned_by` is what the list of models says about the owner of the model, often the engine's name; `None` if the list was not read.
    `failed_at` is the step at which a probe failed, and `problem` what was wrong there, as far as it can tell; `status` is that of the last
    answer that it judged. `listing` is the list of models as it was decoded, only while the result is judged. These ten are not stored.
    """

    server_id: ServerId
    generation: int
    passed: bool
    checked_at: float
    duration: float
    reason: str | None = None
    warning: str | None = None
    unauthorized: bool = False
    models: tuple[str, ...] = ()
    let_in: bool = False
    timed_out: bool = False
    lacks_chat: bool = False
    is_busy: bool = False
    running: Running | None = None
    owned_by: str | None = None
    failed_at: ProbeStep | None = None
    problem: ProbeProblem | None = None
    status: int | None = None
    listing: Any = attrs.field(default=None, eq=False, repr=False)

    @property
    def failed_step(self) -> ProbeStep | None:
        """Return the step at which the probe failed, `None` if it passed; a probe that names no step got an answer it cannot use.

        >>> ProbeResult(server_id=ServerId("x"), generation=1, passed=False, checked_at=1.0, duration=0.1, unauthorized=True).failed_step
        <ProbeStep.ACCESS: 'access'>
        """
        if self.passed:
            return None
        return ProbeStep.ACCESS if self.unauthorized else self.failed_at or ProbeStep.ANSWER


class HealthProbe(Protocol):
    """Find out whether a server works. The caller owns the timeout; any `Exception` counts as a failed result."""

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Return what was found; `http` dials through the gateway's address policy and follows no redirects."""
        ...


@runtime_checkable
class HostProbe(HealthProbe, Protocol):
    """A probe that finds out about all models of a host at once: the gateway asks each host only once per interval."""

    def result_for(self, server: Server, result: ProbeResult) -> ProbeResult:
        """Return what `result`, of another server of the same host, shows about this one."""
        ...


@attrs.frozen(kw_only=True)
class Registry:
    """One consistent read of everything that routing needs.

    `keys` are all client keys, those that are over too, oldest first. `sessions` are browsers' sessions by digest, and until when they last
    (Unix time); those that are over may be among them. `wall_links` are the links to the wall view, oldest first. `hosts` are those that
    were saved (`core.hosts.all_hosts` returns the others, too), `aliases` those that were defined, both oldest first.
    """

    version: int
    servers: tuple[Server, ...]
    health: Mapping[ServerId, Health]
    keys: tuple[ClientKey, ...] = ()
    sessions: Mapping[str, float] = attrs.field(factory=dict)
    wall_links: tuple[WallLink, ...] = ()
    hosts: tuple[Host, ...] = ()
    aliases: tuple[Alias, ...] = ()


class RegistryStore(Protocol):
    """The servers, their health and the client keys: what every store keeps, for every process and replica.

    Raises `StorageUnavailable` from any method when the storage cannot be reached or written; what was acknowledged is never lost. The
    gateway treats any other exception as a refusal: it continues, and does not expect the same call to succeed later. This holds for the
    other parts of a store as well.
    """

    async def open(self) -> None:
        """Connect, create or migrate; called once, before anything else, in the lifespan of the application."""
        ...

    async def version(self) -> int:
        """Return a number that grows with every change of what `load` returns; of health, with those that `save_health` names.

        It does not matter which process made the change.
        """
        ...

    async def changed(self, within: float) -> None:
        """Return when another process may have changed the registry, after `within` seconds at the latest; raise nothing.

        A store that learns of no changes sleeps for that long.
        """
        ...

    async def load(self) -> Registry:
        """Return version, active servers, their health and everything else that a `Registry` holds from one consistent read."""
        ...

    async def save_server(self, server: Server) -> None:
        """Insert or replace; returns only after a durable commit.

        Raises:
            ServerNotFound: The server was removed meanwhile: a change in flight does not undo that.
            AlreadyRegistered: Another server has this model and URL.
        """
        ...

    async def remove_server(self, server_id: ServerId) -> bool:
        """Remove softly (the row stays, with the time of removal, without key and owner's token); false when there is no such server."""
        ...

    async def removed(self) -> Sequence[Server]:
        """Return the servers that were removed, newest first, at most 1,000."""
        ...

    async def save_health(self, changes: Mapping[ServerId, Health], results: Sequence[ProbeResult]) -> None:
        """Save one batch: health of the servers named and results of probes.

        Health of an older generation than the stored server's, and of removed servers, is dropped. The last 100 results of each
        server are kept. `version` grows only when the `state`, `reason`, `reason_path`, `warning` or `generation` of some server changed.
        The fields of `Health` from `next_probe` on mean something to one process only, and need not be kept.
        """
        ...

    async def history(self, server_id: ServerId, limit: int) -> Sequence[ProbeResult]:
        """Return the last results, newest first; the models that they listed are not kept."""
        ...

    async def save_key(self, key: ClientKey) -> None:
        """Insert or replace a client key; returns only after a durable commit. A revoked one stays revoked, whatever is saved."""
        ...

    async def aclose(self) -> None:
        """Close; everything acknowledged is on disk."""
        ...


class Coordination(Protocol):
    """What several processes agree on: every store keeps it."""

    async def claim(self, role: str, holder: str, ttl: float) -> bool:
        """Take or renew the lease of `role` for `ttl` seconds, and return true; return false while another holder has it.

        With a `ttl` of 0 or less nothing is taken: the result says whether the lease is free or the holder's own, and its own one ends.
        """
        ...

    async def secret(self, name: str, proposal: str) -> str:
        """Return the value kept under `name`, after keeping `proposal` if there is none yet; atomic over all processes, and durable."""
        ...


class SessionStore(Protocol):
    """The browsers' sessions, an optional part of a store: `version` grows with them, and `load` returns them.

    With a store that lacks it, each process knows only the sessions that it opened itself, and they end with it.
    """

    async def open_session(self, digest: str, until: float) -> None:
        """Let a browser's session count in every process until `until` (Unix time); the store may forget it then."""
        ...

    async def close_session(self, digest: str) -> bool:
        """End a session in every process; return only after a durable commit. True once, then false, as for a session that never was."""
        ...


class WallLinkStore(Protocol):
    """The links to the wall view, an optional part of a store: `version` grows with them, and `load` returns them.

    With a store that lacks it, each process knows only the links that it created itself, and they end with it.
    """

    async def save_wall_link(self, link: WallLink) -> None:
        """Insert a link; return only after a durable commit. The same link may be saved again."""
        ...

    async def remove_wall_link(self, link_id: str) -> bool:
        """Remove a link in every process; return only after a durable commit. True once, then false, as for a link that never was."""
        ...


class HostStore(Protocol):
    """The hosts and the aliases, an optional part of a store: `version` grows with them, and `load` returns them.

    With a store that lacks it, each process knows only those that it saved itself, and they end with it.
    """

    async def save_host(self, host: Host, servers: Sequence[Server] = ()) -> None:
        """Insert or replace a host and servers of it, all or none; return only after a durable commit.

        Raises:
            ServerNotFound: One of the servers was removed meanwhile.
            AlreadyRegistered: Another server has the model and URL of one of them.
        """
        ...

    async def remove_host(self, host_id: HostId) -> bool:
        """Remove a host, and its servers as `remove_server` does, in one commit; false when there is neither."""
        ...

    async def save_alias(self, alias: Alias) -> None:
        """Insert or replace an alias by its name; return only after a durable commit."""
        ...

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias; return only after a durable commit. True once, then false, as for an alias that never was."""
        ...


class UsageStore(Protocol):
    """The usage counts, an optional part of a store.

    With a store that lacks it, each process knows only what it counted itself, and that ends with it.
    """

    async def add_usage(self, batch: str, rows: Sequence[Usage]) -> None:
        """Add counts to those that are kept, all or none; a batch that was added within the last day is not added again.

        No sum overflows: it stops at `core.usage.MAX_COUNT`, 2**53 - 1.
        """
        ...

    async def usage(self, since: str, until: str) -> Sequence[Usage]:
        """Return what is kept of these days, both included (ISO 8601), by day, then in the order of the other parts of the key."""
        ...

    async def requests_on(self, day: str) -> Mapping[str, int]:
        """Return how many requests each client sent on a day (ISO 8601), at most `MAX_COUNT`; clients without any are left out."""
        ...


class UsageSumStore(Protocol):
    """Sums of the usage counts, an optional part of a store: pages show sums of many rows, and a database adds faster than the gateway.

    With a store that lacks it, the gateway reads and adds up all rows of the days.
    """

    async def sum_usage(self, since: str, until: str, *, by: Collection[str], only: Mapping[str, Collection[str]]) -> Sequence[Usage]:
        """Return the sums of what is kept of these days, both included, by the parts of `UsageKey` that `by` names, in their order.

        The other parts of the keys are empty. `only` names parts, each with the values that count. Sums stop at `MAX_COUNT`.
        """
        ...


class Store(RegistryStore, Coordination, SessionStore, WallLinkStore, HostStore, UsageStore, UsageSumStore, Protocol):
    """The durable registry with all its parts: what the gateway works with. `plugins.completed` makes one of a store with fewer parts."""


class ResponseStore(Protocol):
    """An optional part of a store: it keeps the places of stored responses, for all processes.

    With a store that lacks it, each process knows only the responses that it relayed itself. Raises what a `Store` raises.
    """

    async def save_responses(self, responses: Sequence[StoredResponse]) -> None:
        """Insert or replace a batch by key. Expired responses are deleted, and so are the oldest beyond 100,000."""
        ...

    async def find_response(self, key: str) -> StoredResponse | None:
        """Return the place of a response, or `None`; an expired one may still be found."""
        ...


def methods_of(protocol: type) -> frozenset[str]:
    """Return the names of the methods of a protocol, those of its parts included.

    >>> sorted(methods_of(Coordination)), methods_of(Coordination) < methods_of(Store)
    (['claim', 'secret'], True)
    """
    parts = [part for part in protocol.__mro__ if part.__module__ == __name__]
    return frozenset(name for part in parts for name, member in vars(part).items() if isfunction(member) and not name.startswith("_"))
