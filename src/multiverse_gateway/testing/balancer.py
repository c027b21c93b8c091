"""What every balancer must do, as tests. Needs pytest and hypothesis."""

import time
import warnings
from collections.abc import Sequence

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.servers import HostId, Server, ServerId
from multiverse_gateway.protocols import Balancer, LoadView


@attrs.frozen
class FixedLoad:
    """A load with fixed figures; by default nothing runs and nothing is known."""

    running: dict[str, int] = attrs.field(factory=dict)
    latencies: dict[str, float] = attrs.field(factory=dict)
    shares: dict[str, float] = attrs.field(factory=dict)

    def in_flight(self, server_id: ServerId) -> int:
        """Return the number of running attempts."""
        return self.running.get(server_id, 0)

    def host_in_flight(self, host_id: HostId) -> int:
        """Return the number of running attempts: in these tests each server is a host by itself."""
        return self.running.get(host_id, 0)

    def latency(self, server_id: ServerId) -> float | None:
        """Return the latency that the test set for a server."""
        return self.latencies.get(server_id)

    def traffic_share(self, server_id: ServerId) -> float:
        """Return the share that the test set for a server."""
        return self.shares.get(server_id, 1.0)

    def share(self, server_id: ServerId) -> float:
        """Return `traffic_share` under its old name, with a `DeprecationWarning`."""
        warnings.warn("LoadView.share is deprecated; use LoadView.traffic_share", DeprecationWarning, stacklevel=2)
        return self.traffic_share(server_id)


IDLE: LoadView = FixedLoad()


def make_servers(count: int, *, weights: Sequence[int] = ()) -> tuple[Server, ...]:
    """Return servers of one model, named a, b, c …, in the order of registration."""
    return tuple(
        Server(
            id=ServerId(chr(ord("a") + number)),
            model_name="tiny",
            endpoint_url=f"http://{chr(ord('a') + number)}.example",
            weight=weights[number] if weights else 1,
            registered_at=float(number),
            created_at=float(number),
            updated_at=float(number),
        )
        for number in range(count)
    )


def make_request(model: str = "tiny") -> Envelope:
    """Return a request for the model."""
    return Envelope(model=model, stream=False, stateful=False, wants_usage=False, path="/v1/chat/completions", dialect=Dialect.CHAT)


_POSITIVE = st.floats(0.001, 1000.0)

loads = st.builds(
    FixedLoad,
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5000)),
    st.dictionaries(st.sampled_from("abcdefgh"), _POSITIVE),
    st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.25, 1.0)),
)
"""Any load of the servers a to h."""

rounds = st.lists(
    st.tuples(st.sets(st.integers(0, 7), min_size=1), loads, st.sampled_from(["tiny", "small", "large"])), min_size=1, max_size=60
)
"""Picks in a row: which servers are there, their load, and the model asked for."""

_ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])


class BalancerContract:
    """Subclass it with a fixture `balancer` that returns a fresh one."""

    @_ANY
    @given(picks=rounds)
    def test_one_of_the_servers_is_picked(self, balancer: Balancer, picks: list[tuple[set[int], FixedLoad, str]]) -> None:
        """Whatever the load is, and whichever servers come and go between calls."""
        all_servers = make_servers(8, weights=[1, 2, 3, 100, 1, 1, 7, 1])
        for numbers, load, model in picks:
            servers = tuple(all_servers[number] for number in sorted(numbers))
            assert balancer.pick(servers, load, make_request(model)) in servers

    def test_a_list_that_changes_is_read_anew(self, balancer: Balancer) -> None:
        """A server that was removed from the very same list is not picked."""
        all_servers = list(make_servers(3))
        for _ in range(5):
            balancer.pick(all_servers, IDLE, make_request())
        del all_servers[1:]
        assert all(balancer.pick(all_servers, IDLE, make_request()) is all_servers[0] for _ in range(5))

    def test_nobody_is_forgotten(self, balancer: Balancer) -> None:
        """Equal servers that take their time all get requests."""
        servers = make_servers(5)
        running = dict.fromkeys("abcde", 0)
        load = FixedLoad(running)
        for _ in range(300):
            running[balancer.pick(servers, load, make_request()).id] += 1
        assert min(running.values()) > 20

    def test_many_models_need_bounded_memory(self, balancer: Balancer) -> None:
        """Names come from clients' requests and from owners: ten thousand of them must not slow it down."""
        servers = make_servers(2)
        for number in range(10_000):
            assert balancer.pick(servers, IDLE, make_request(f"model-{number}")) in servers

    def test_a_pick_is_quick(self, balancer: Balancer) -> None:
        """It runs on the event loop for every attempt: far below a millisecond of the processor with fifty servers."""
        servers, request = make_servers(50), make_request()
        began = time.process_time()
        for _ in range(200):
            balancer.pick(servers, IDLE, request)
        assert (time.process_time() - began) / 200 < 0.001
