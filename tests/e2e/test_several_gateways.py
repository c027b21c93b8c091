"""Three gateways on one PostgreSQL and one Redis behind one nginx are one gateway, whatever happens to any of them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random

import attrs
import httpx2
import pytest

from support.backends import Backend
from support.processes import GatewayProcess
from support.services import SECRET, Nginx, PostgresServer, RedisServer
from support.shelf import Shelf
from support.sockets import serving, wait_until

pytestmark = [
    pytest.mark.e2e,
    # a backend that stops listening may lose a connection that the kernel had accepted just then
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LIMIT = 60
LATE = (
    "-c",
    "import sys, time; real = time.time; time.time = lambda: real() + 900\n"
    "from multiverse_gateway.cli import main; main(['run', *sys.argv[1:]])",
)
"""The command of a gateway whose clock is a quarter of an hour ahead."""
SEEN_WITHIN = 2.0
"""What the service promises: a change is everywhere after so many seconds."""
SLACK = 3.0
"""What two busy cores may take besides."""
LEASE = 5.0


@attrs.define(eq=False)
class Cluster:
    """The gateways, and what they have in common; the third one's clock is wrong."""

    postgres: PostgresServer
    redis: RedisServer
    gateways: list[GatewayProcess]
    nginx: Nginx
    _chance: Random = attrs.field(factory=lambda: Random(7))

    def visitor(self) -> dict[str, str]:
        """Return the header of somebody who was never here before."""
        return {"x-forwarded-for": f"198.51.{self._chance.randrange(256)}.{self._chance.randrange(256)}"}

    def ask(self, url: str, model: str, timeout: float = 30.0) -> int:
        """Ask a model at a gateway, or at nginx, and return the status."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        return httpx2.post(f"{url}/v1/chat/completions", json=body, headers=self.visitor(), timeout=timeout, trust_env=False).status_code

    def everywhere(self, model: str) -> set[int]:
        """Ask every gateway."""
        return {self.ask(gateway.url, model) for gateway in self.gateways}

    def statuses(self, server: str) -> set[str]:
        """Return what the gateways say of a server's health."""
        return {gateway.server(server)["health_status"] for gateway in self.gateways}

    def prober(self) -> GatewayProcess | None:
        """Return the gateway that probes, as each says itself."""
        for gateway in self.gateways:
            said = re.findall(r"(this|another) process probes", gateway.log_text().rpartition("starting")[2])
            if gateway.is_running and said and said[-1] == "this":
                return gateway
        return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start everything on an empty database, all gateways at once."""
    with ExitStack() as stack:
        postgres, redis = stack.enter_context(PostgresServer()), stack.enter_context(RedisServer())
        settings = {
            "DATABASE_URL": postgres.database(),
            "BACKEND_KEY_SECRET": SECRET,
            "RATE_LIMIT_STORAGE": redis.url,
            "RATE_LIMIT_PER_MINUTE": str(LIMIT),
            "TRUSTED_PROXIES": "127.0.0.1/32",
            "HEALTH_CHECK_INTERVAL_SECONDS": "1",
            "LOG_LEVEL": "INFO",
        }
        usual = ("-m", "multiverse_gateway", "run")
        gateways = [GatewayProcess(settings, command=command, ready_within=90) for command in (usual, usual, LATE)]
        starting = [threading.Thread(target=stack.enter_context, args=[gateway]) for gateway in gateways]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        assert all(gateway.is_ready() for gateway in gateways)
        nginx = stack.enter_context(Nginx([gateway.port for gateway in gateways]))
        yield Cluster(postgres, redis, gateways, nginx)


def test_what_one_does_all_do(cluster: Cluster) -> None:
    """Registered with one it is served by all; removed from another it is gone from all, for good."""
    backend = Backend("shared", models=("shared",))
    with serving(backend):
        server = cluster.gateways[0].register("shared", backend.url)
        began = time.monotonic()
        wait_until(lambda: cluster.everywhere("shared") == {200}, within=SEEN_WITHIN + SLACK)
        assert {cluster.ask(cluster.nginx.url, "shared") for _ in range(9)} == {200}
        assert cluster.gateways[1].admin("DELETE", f"/register/{server}").status_code == 200
        assert cluster.ask(cluster.gateways[1].url, "shared") == 404
        time.sleep(SEEN_WITHIN)  # the promise itself; what comes later counts
        hits = backend.hits
        assert {cluster.ask(cluster.nginx.url, "shared") for _ in range(9)} | cluster.everywhere("shared") == {404}
        assert backend.hits == hits
        assert time.monotonic() - began < 30


def test_the_limit_is_that_of_all_together(cluster: Cluster) -> None:
    """Sixty calls a minute, whichever gateway they come to; the clock that is wrong changes nothing.

    On a machine so busy that Redis takes longer than 100 ms they count by themselves for five seconds: then somebody else tries.
    """

    def statuses() -> list[int]:
        with httpx2.Client(headers=cluster.visitor(), trust_env=False) as client:
            urls = [gateway.url for gateway in cluster.gateways]
            body = {"model": "unknown", "messages": []}
            return [client.post(f"{urls[number % 3]}/v1/chat/completions", json=body).status_code for number in range(LIMIT + 6)]

    wait_until(lambda: statuses() == [404] * LIMIT + [429] * 6, within=60)


def test_one_gateway_probes_and_another_takes_over(cluster: Cluster) -> None:
    """Each server is probed once in its interval, not once by each; killed, the prober is replaced within its lease."""
    backend = Backend("probed", models=("probed",))
    with serving(backend):
        cluster.gateways[0].register("probed", backend.url)
        wait_until(lambda: cluster.prober() is not None, within=LEASE + SLACK)
        wait_until(lambda: len(backend.probes) >= 2, within=10)
        before, began = len(backend.probes), time.monotonic()
        wait_until(lambda: len(backend.probes) >= before + 5, within=30)
        assert time.monotonic() - began > 1.8  # three probers would need a third of it: the interval of one is half a second
        prober = cluster.prober()
        assert prober is not None
        prober.kill()
        killed = time.monotonic()
        others = [gateway for gateway in cluster.gateways if gateway is not prober]
        wait_until(lambda: cluster.prober() in others, within=LEASE + SLACK)
        before = len(backend.probes)
        wait_until(lambda: len(backend.probes) > before, within=5)
        assert time.monotonic() - killed < LEASE + SLACK + 5
        assert {cluster.ask(cluster.nginx.url, "probed") for _ in range(6)} == {200}
        prober.start()
        wait_until(lambda: cluster.ask(prober.url, "probed") == 200, within=5)


def test_a_server_that_dies_is_out_everywhere(cluster: Cluster) -> None:
    """One gateway's requests find it dead; the others hear of it, and of its return."""
    backend, other = Backend("dying", models=("dying",)), Backend("living", models=("dying",))
    with serving(backend, other):
        server = cluster.gateways[0].register("dying", backend.url)
        cluster.gateways[0].register("dying", other.url)
        wait_until(lambda: cluster.everywhere("dying") == {200}, within=5)
        backend.refuse()
        for _ in range(4):
            assert cluster.ask(cluster.gateways[0].url, "dying") == 200
        wait_until(lambda: cluster.statuses(server) == {"unhealthy"}, within=SEEN_WITHIN + SLACK)
        backend.accept()
        wait_until(lambda: cluster.statuses(server) == {"healthy"}, within=15)


def hammer(cluster: Cluster, model: str, harm: Callable[[], None]) -> list[float]:
    """Ask every gateway without a pause while `harm` is done, and return the seconds that each answer took; all must be good."""
    took: list[float] = []
    wrong: list[object] = []
    stop = threading.Event()

    def ask(gateway: GatewayProcess) -> None:
        body = {"model": model, "messages": []}
        with httpx2.Client(base_url=gateway.url, trust_env=False, timeout=30) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    answer = client.post("/v1/chat/completions", json=body, headers=cluster.visitor())
                    wrong.extend([answer.text] if answer.status_code != 200 else [])
                except httpx2.HTTPError as error:
                    wrong.append(error)
                took.append(time.monotonic() - began)

    threads = [threading.Thread(target=ask, args=[gateway]) for gateway in cluster.gateways for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        harm()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    return took


def test_no_request_waits_for_either_of_them(cluster: Cluster) -> None:
    """Both stopped under load: every request is answered, none waits for them, writes are refused in time; all comes back by itself."""
    backend = Backend("steady", models=("steady", "later"))
    later = {"model_name": "later", "endpoint_url": backend.url}
    with serving(backend):
        cluster.gateways[0].register("steady", backend.url)
        wait_until(lambda: cluster.everywhere("steady") == {200}, within=5)

        def stop_both() -> None:
            cluster.postgres.pause()
            cluster.redis.pause()
            answer = cluster.gateways[1].admin("POST", "/register", later)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
            assert cluster.gateways[1].call("GET", "/health").json()["database"] == "unavailable"

        took = hammer(cluster, "steady", stop_both)
        cluster.postgres.resume()
        cluster.redis.resume()
        assert len(took) > 100
        assert max(took) < 4  # a request that waits for PostgreSQL takes five seconds, for Redis until the end of the test
        wait_until(lambda: cluster.gateways[1].admin("POST", "/register", later).status_code in (200, 201), within=15)
        wait_until(lambda: cluster.everywhere("later") == {200}, within=SEEN_WITHIN + SLACK)


def test_a_database_that_restarts_stops_nobody(cluster: Cluster) -> None:
    """Killed and started again: requests go on, writes come back, the gateways are not restarted, and changes are told again."""
    backend = Backend("lasting", models=("lasting", "after"))
    with serving(backend):
        cluster.gateways[0].register("lasting", backend.url)
        wait_until(lambda: cluster.everywhere("lasting") == {200}, within=5)
        pids = [gateway.pid for gateway in cluster.gateways]

        def restart() -> None:
            cluster.postgres.kill()
            answer = cluster.gateways[2].admin("POST", "/register", {"model_name": "after", "endpoint_url": backend.url})
            assert answer.status_code == 503
            cluster.postgres.start()

        assert max(hammer(cluster, "lasting", restart)) < 4
        body = {"model_name": "after", "endpoint_url": backend.url}
        wait_until(lambda: cluster.gateways[2].admin("POST", "/register", body).status_code in (200, 201), within=15)
        wait_until(lambda: cluster.everywhere("after") == {200}, within=SEEN_WITHIN + SLACK)
        assert [gateway.pid for gateway in cluster.gateways if gateway.is_running] == pids


def test_a_gateway_that_cannot_start_says_why() -> None:
    """In one line, without a traceback and without the password."""
    gateway = GatewayProcess({"DATABASE_URL": "postgresql://somebody:a-password@127.0.0.1:1/gateway", "BACKEND_KEY_SECRET": SECRET})
    gateway.launch()
    assert gateway.wait(60) == 1
    assert "Error: the gateway could not start: The PostgreSQL server at 127.0.0.1" in gateway.log_text()
    assert "Traceback" not in gateway.log_text()
    assert "a-password" not in gateway.log_text()


def test_a_response_that_one_relayed_the_others_find(cluster: Cluster) -> None:
    """Right after it was made, though one gateway's clock is wrong; another address gets 404."""
    backend = Backend("keeper", Shelf("keeper"))
    with serving(backend):
        server = cluster.gateways[0].register("keeper", backend.url)
        wait_until(lambda: all(gateway.admin("GET", f"/admin/servers/{server}").status_code == 200 for gateway in cluster.gateways))
        visitor = cluster.visitor()
        for number, gateway in enumerate(cluster.gateways):
            made = gateway.call("POST", "/v1/responses", {"model": "keeper", "input": "x"}, headers=visitor)
            assert made.status_code == 200, made.text
            other = cluster.gateways[number - 1]
            path = f"/v1/responses/{made.json()['id']}"
            assert other.call("GET", path, headers=visitor).status_code == 200
            assert other.call("GET", path, headers=cluster.visitor()).status_code == 404
        cluster.gateways[0].admin("DELETE", f"/admin/register/{server}")
