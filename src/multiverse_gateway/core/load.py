"""What this process does at the moment: attempts on each server, retries and waiting requests of each model.

The sum of all slots is the number of live attempts: each call of `started` is followed by exactly one of `finished`, whatever happens.
"""

import warnings

from attrs import define, field

from multiverse_gateway.core.servers import HostId, ServerId

SMOOTHING = 0.25
"""Weight of the newest latency in the moving average."""
FAILURE_FACTOR = 0.25
"""Part of the first-byte timeout that a failure counts as: failing fast must not look fast."""
DECAY_SECONDS = 10.0
"""Seconds between two decays of the latencies that no request has measured."""
DECAY_FACTOR = 0.5
"""Part of the latency that remains after each decay."""
MIN_RETRIES = 3
"""Concurrent retries that a model may always have."""
RETRY_FRACTION = 0.2
"""Part of a model's attempts that may be retries."""
MAX_LAG_SECONDS = 0.5
"""Seconds; an event loop that runs later than this lags."""
MAX_LAGGING_SECONDS = 5.0
"""Seconds for which it may lag before new requests are refused."""
SMALL_BODY_BYTES = 65_536
"""Size up to which a body counts toward no client's part of the memory for bodies."""


def retry_seconds(random: float) -> float:
    """Return when a client that there was no room for should send its request again: in 1 to 5 seconds, so that not all come at once.

    `random` is a random number in [0, 1).
    """
    return 1.0 + 4.0 * random


@define(eq=False)
class Load:
    """Count attempts and remember latencies; implements `protocols.LoadView`. Attempts count for their server and for its host.

    >>> load = Load()
    >>> load.started("a", "llama", "host")
    >>> load.in_flight("a"), load.host_in_flight("host"), load.total
    (1, 1, 1)
    >>> load.finished("a", "llama", "host", seconds=0.5, failed=False, first_byte_timeout=120.0)
    >>> load.in_flight("a"), load.latency("a")
    (0, 0.5)
    """

    total: int = field(default=0, init=False)
    """Number of live attempts."""
    _servers: dict[ServerId, int] = field(factory=dict, init=False)
    _hosts: dict[HostId, int] = field(factory=dict, init=False)
    _models: dict[str, int] = field(factory=dict, init=False)
    _retries: dict[str, int] = field(factory=dict, init=False)
    _latencies: dict[ServerId, float] = field(factory=dict, init=False)
    _measured: set[ServerId] = field(factory=set, init=False)
    _traffic_shares: dict[ServerId, float] = field(factory=dict, init=False)
    _forgotten: set[ServerId] = field(factory=set, init=False)

    def started(self, server_id: ServerId, model: str, host_id: HostId | None = None) -> None:
        """Take a slot of the server and of its host for an attempt; without `host_id` the server is a host by itself."""
        host_id = host_id or HostId(server_id)
        servers, hosts, models = self._servers, self._hosts, self._models
        servers[server_id] = servers.get(server_id, 0) + 1
        hosts[host_id] = hosts.get(host_id, 0) + 1
        models[model] = models.get(model, 0) + 1
        self.total += 1

    def finished(
        self,
        server_id: ServerId,
        model: str,
        host_id: HostId | None = None,
        *,
        seconds: float | None,
        failed: bool,
        first_byte_timeout: float,
    ) -> None:
        """Give the slots back. `seconds` to the first byte is `None` when the attempt says nothing about the server.

        Raises:
            KeyError: No such attempt was started.
        """
        host_id = host_id or HostId(server_id)
        servers, hosts, models = self._servers, self._hosts, self._models
        left = servers[server_id] - 1
        if left:
            servers[server_id] = left
        else:
            del servers[server_id]
        left = hosts[host_id] - 1
        if left:
            hosts[host_id] = left
        else:
            del hosts[host_id]
        left = models[model] - 1
        if left:
            models[model] = left
        else:
            del models[model]
        self.total -= 1
        if failed:
            seconds = first_byte_timeout * FAILURE_FACTOR
        if seconds is not None:
            latency = self._latencies.get(server_id)
            self._latencies[server_id] = seconds if latency is None else latency + SMOOTHING * (seconds - latency)
            self._measured.add(server_id)
        if self._forgotten:
            self._forget_finished(server_id)

    def in_flight(self, server_id: ServerId) -> int:
        """Return the number of attempts that run on the server now."""
        return self._servers.get(server_id, 0)

    def host_in_flight(self, host_id: HostId) -> int:
        """Return the number of attempts that run on all servers of the host now."""
        return self._hosts.get(host_id, 0)

    def model_in_flight(self, model: str) -> int:
        """Return the number of attempts that run for the model now."""
        return self._models.get(model, 0)

    def latency(self, server_id: ServerId) -> float | None:
        """Return the moving average of seconds to the first byte, failures counted as slow; `None` before the first attempt.

        It decays while no request measures it.
        """
        return self._latencies.get(server_id)

    def decay(self) -> None:
        """Reduce the latencies that were not measured since the last call, so that a server that was slow once is tried again.

        Called every `DECAY_SECONDS`.
        """
        for server_id in self._latencies.keys() - self._measured:
            self._latencies[server_id] *= DECAY_FACTOR
        self._measured.clear()

    def traffic_share(self, server_id: ServerId) -> float:
        """Return the part of its usual traffic that the server should get; 1 unless something else was set."""
        return self._traffic_shares.get(server_id, 1.0)

    def set_traffic_share(self, server_id: ServerId, traffic_share: float) -> None:
        """Note the part of its usual traffic that the server should get (`core.health.traffic_share`)."""
        if traffic_share < 1.0:
            self._traffic_shares[server_id] = traffic_share
        else:
            self._traffic_shares.pop(server_id, None)

    def share(self, server_id: ServerId) -> float:
        """Return `traffic_share` under its old name, with a `DeprecationWarning`."""
        warnings.warn("LoadView.share is deprecated; use LoadView.traffic_share", DeprecationWarning, stacklevel=2)
        return self.traffic_share(server_id)

    def retry_started(self, model: str) -> None:
        """Note that one of the model's attempts is a retry."""
        self._retries[model] = self._retries.get(model, 0) + 1

    def retry_finished(self, model: str) -> None:
        """Note that a retry is over.

        Raises:
            KeyError: No retry was started.
        """
        if self._retries[model] == 1:
            del self._retries[model]
        else:
            self._retries[model] -= 1

    def retries_in_flight(self, model: str) -> int:
        """Return the number of retries that run for the model now."""
        return self._retries.get(model, 0)

    def retry_budget_left(self, model: str) -> bool:
        """Return whether the model may have one more retry."""
        return self.retries_in_flight(model) < max(MIN_RETRIES, RETRY_FRACTION * self.model_in_flight(model))

    def forget(self, server_id: ServerId) -> None:
        """Drop what is remembered of a removed server; attempts that still run on it keep their slots."""
        self._latencies.pop(server_id, None)
        self._traffic_shares.pop(server_id, None)
        if server_id in self._servers:
            self._forgotten.add(server_id)

    def _forget_finished(self, server_id: ServerId) -> None:
        if server_id in self._forgotten and server_id not in self._servers:
            self._forgotten.discard(server_id)
            self._latencies.pop(server_id, None)


@define(eq=False)
class LagDetector:
    """Detect that this process cannot keep up, because its event loop lags continuously. Durations are in seconds.

    >>> detector = LagDetector()
    >>> [detector.note(0.6, now) for now in (1.0, 3.0, 6.1)], detector.note(0.1, 6.2)
    ([False, False, True], False)
    """

    _since: float | None = field(default=None, init=False)

    def note(self, lag: float, now: float) -> bool:
        """Record that the event loop is `lag` seconds late at the monotonic instant `now`; return whether it has lagged for too long."""
        if lag <= MAX_LAG_SECONDS:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since >= MAX_LAGGING_SECONDS


@define(eq=False)
class ByteBudget:
    """Bound the memory that bodies or answers take together.

    >>> budget = ByteBudget(10)
    >>> budget.hold(8), budget.hold(8), budget.held, budget.has_room(2)
    (True, False, 8, True)
    >>> budget.release(8)
    >>> budget.held
    0
    """

    limit: int
    """Bytes."""
    held: int = 0

    def has_room(self, count: int) -> bool:
        """Return whether so many bytes more may be held."""
        return self.held + count <= self.limit

    def hold(self, count: int) -> bool:
        """Count bytes as held; return whether there was room for them."""
        has_room = self.held + count <= self.limit
        if has_room:
            self.held += count
        return has_room

    def release(self, count: int) -> None:
        """Stop counting bytes as held."""
        self.held -= count


@define(eq=False)
class BodyBudget(ByteBudget):
    """Bound the memory that bodies take, and what one client may take of it.

    Once half of the memory is taken, a client holds a quarter of it at most, or a single body. Bodies up to `SMALL_BODY_BYTES` count
    toward the whole only, which saves a look-up for most requests.

    >>> budget = BodyBudget(1_000_000)
    >>> budget.hold(600_000), budget.count_large("script", 600_000)
    (True, None)
    >>> budget.may_hold("script", 100_000), budget.may_hold("script", 1_000), budget.may_hold("person", 300_000)
    (False, True, True)
    """

    _large: dict[str, int] = field(factory=dict, init=False)

    def may_hold(self, client: str, count: int, own: int = 0) -> bool:
        """Return whether a client may hold so many bytes more of a body of which it holds `own`; those of a large one are counted."""
        if not self.has_room(count):
            return False
        if own + count <= SMALL_BODY_BYTES or 2 * (self.held + count) <= self.limit:
            return True
        others = self._large.get(client, 0) - (own if own > SMALL_BODY_BYTES else 0)
        return not others or 4 * (others + own + count) <= self.limit

    def count_large(self, client: str, more: int) -> None:
        """Count bytes of a client's large bodies, or less than none to count them no more; `held` counts them besides."""
        left = self._large.get(client, 0) + more
        if left:
            self._large[client] = left
        else:
            del self._large[client]


@define(eq=False, kw_only=True)
class Admission:
    """Bound what one process does at a time.

    >>> admission = Admission(max_in_flight=2)
    >>> admission.may_start(1), admission.may_start(2)
    (True, False)
    """

    max_in_flight: int = 1024
    """Most live requests of the whole process."""
    shedding: bool = False
    """Whether nothing new may start, whatever the numbers are: the process does not keep up."""
    is_closed: bool = False
    """Whether nothing new may start because the process is to end."""
    begun: int = 0
    """How many requests have begun so far; the number of each is its place among them."""
    bodies: BodyBudget = field(factory=lambda: BodyBudget(1 << 40))
    """Requests' bodies that are kept."""
    answers: ByteBudget = field(factory=lambda: ByteBudget(1 << 40))
    """Servers' answers that are held, beyond what every exchange may hold."""

    def may_start(self, total: int) -> bool:
        """Return whether one more request may start while `total` are live."""
        return total < self.max_in_flight and not self.shedding

    @property
    def uncapped_slots(self) -> int:
        """Most requests that may run for one model whose servers have no caps: half of all, so that other models get some, too."""
        return max(1, self.max_in_flight // 2)

    def places(self, most: int) -> int:
        """Return how many requests may wait for one model, `most` by the setting: a quarter of all live ones, for the same reason.

        >>> Admission(max_in_flight=1024).places(256), Admission(max_in_flight=8).places(256), Admission(max_in_flight=8).places(0)
        (256, 2, 0)
        """
        return min(most, max(1, self.max_in_flight // 4))

    def has_much_room(self, total: int, length: int) -> bool:
        """Return whether any client may start one more request with a body of this length, while `total` are live: half of all is free.

        It is what the other questions come to for most requests, and saves asking them one by one.

        >>> admission = Admission(max_in_flight=8, bodies=BodyBudget(1_000))
        >>> admission.has_much_room(3, 500), admission.has_much_room(4, 500), admission.has_much_room(3, 501)
        (True, False, False)
        """
        return 2 * total < self.max_in_flight and 2 * (self.bodies.held + length) <= self.bodies.limit and not self.shedding

    def leaves_room(self, total: int, own: int) -> bool:
        """Return whether a client with `own` live requests may have one more: once half of all are live, it has a quarter at most, or one.

        >>> admission = Admission(max_in_flight=8)
        >>> admission.leaves_room(3, 3), admission.leaves_room(4, 1), admission.leaves_room(4, 2)
        (True, True, False)
        """
        return 2 * total < self.max_in_flight or not own or 4 * own < self.max_in_flight
