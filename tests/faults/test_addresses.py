"""The gateway dials only what it may, through every door that takes a URL: listeners that count connections prove it."""

from __future__ import annotations

import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import attrs
import httpx2
import pytest
from starlette.applications import Starlette

from multiverse_gateway.app import create_app, lifespan
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.settings import Settings
from multiverse_gateway.stores.memory import MemoryStore
from support import behaviours
from support.backends import Backend
from support.fault_proxy import FaultProxy
from support.processes import GatewayProcess
from support.sockets import free_port, serving

ADMIN_KEY = "an-admin-key-for-tests"


def words(text: str) -> tuple[str, ...]:
    """Split a text at its white space."""
    return tuple(text.split())


CLOSED = words(
    """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.0.0.2 127.1.2.3 127.255.255.254
    168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1
    192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1
    2001::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe::1 3fff::1 5f00::1 fc00::1 fd00::1 fd00:ec2::254
    fd20:ce::254 fe80::1 fe80::a9fe:a9fe fec0::1 ff02::1 ff05::2
    """
)
"""Addresses that are closed, one of each special range and then some."""

SPELLINGS = words(
    """
    2130706433 0x7f000001 0x7f.0.0.1 0x7f.1 0177.0.0.1 0177.1 127.1 127.0.1 017700000001 127.0.0.01 127.000.000.001 0 0x0 00 0.0
    3232235777 0xa9fea9fe 0251.0376.0251.0376 2852039166 1.1 127.0.0.1. localhost localhost. LOCALHOST a.localhost a.b.localhost
    127.0.0.1%00 127.0.0.1%0d%0a \u2460\u2461\u2466.\u24ea.\u24ea.\u2460 127\u30020\u30020\u30021 \uff11\uff12\uff17.0.0.1
    \u246f\u2468\u3002\u2461\u2464\u2463\uff61\u246f\u2468 \uff4cocalhost
    [::1] [0:0:0:0:0:0:0:1] [0000::0001] [::127.0.0.1] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:7f00:1]
    [::ffff:0:127.0.0.1] [fe80::1%25eth0] [fe80::1%eth0] [::1%25lo] [v1.127.0.0.1] [127.0.0.1] ::1
    user@127.0.0.1 user:pass@127.0.0.1 gpu.example@127.0.0.1 127.0.0.1@gpu.example gpu.example:80@127.0.0.1
    127.0.0.1\\@gpu.example gpu.example\\@127.0.0.1 127.0.0.1#@gpu.example 127.0.0.1?@gpu.example gpu..example -gpu.example
    """
)
"""Other ways to write some of them, and ways to hide them: each is refused or means what it says."""

FORMS = (
    "http://127.0.0.1:{port}",
    "HTTP://127.0.0.1:{port}/v1",
    "http:127.0.0.1:{port}",
    "http:/127.0.0.1:{port}",
    "http:///127.0.0.1:{port}",
    "//127.0.0.1:{port}",
    "127.0.0.1:{port}",
    "http://127.0.0.1:{port}/?x=1",
    "http://127.0.0.1:{port}/../..",
    "http://127.0.0.1:{port}/%2e%2e/",
    "http://127.0.0.1:22",
    "http://127.0.0.1:0{port}",
    "http://127.0.0.1:{port}@gpu.example",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_GET",
    "ftp://127.0.0.1:{port}",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock",
    "data:application/json,[]",
    "ws://127.0.0.1:{port}",
    "http://[::1]:{port}",
    "https://127.0.0.1:{port}",
    "http://127.0.0.1:{port}\r\nHost: gpu.example",
    "http://127.0.0.1:{port}\tx",
    " http://127.0.0.1:{port} ",
)


def payloads(port: int) -> list[str]:
    """Return the URLs: every closed address as a literal and behind a name, every spelling, every form."""
    literals = [f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}" for address in CLOSED]
    names = [f"http://to-{number}.example:{port}" for number in range(len(CLOSED))]
    spelled = [f"http://{host}:{port}" for host in SPELLINGS]
    return [*literals, *names, *spelled, *(form.format(port=port) for form in FORMS)]


@attrs.define(eq=False)
class Resolver:
    """Answer for names as the test wants; `answers` of a name are given in turn, the last one for ever."""

    answers: dict[str, list[Sequence[str]]] = attrs.field(factory=dict)
    asked: list[str] = attrs.field(factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host.startswith("to-"):
            return [CLOSED[int(host.removeprefix("to-").removesuffix(".example"))]]
        script = self.answers.get(host, [["127.0.0.1"]])  # whatever gets this far would reach a listener
        return script.pop(0) if len(script) > 1 else script[0]


@attrs.define
class Counters:
    """Listeners on both loopback addresses that count who connects."""

    port: int
    sockets: list[socket.socket]

    def connections(self) -> int:
        """Return how many connected since the last call."""
        count = 0
        for listening in self.sockets:
            while True:
                try:
                    listening.accept()[0].close()
                except BlockingIOError:
                    break
                count += 1
        return count


@contextmanager
def counters() -> Iterator[Counters]:
    """Listen on 127.0.0.1, where all of 127.0.0.0/8 and 0.0.0.0 arrive as well, and on ::1, on one port."""
    port = free_port()
    made: list[socket.socket] = []
    try:
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):
            listening = socket.socket(family)
            made.append(listening)
            if family is socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listening.bind((host, port))
            except OSError:  # a machine without IPv6
                made.remove(listening)
                listening.close()
                continue
            listening.listen(512)
            listening.setblocking(False)
        yield Counters(port, made)
    finally:
        for listening in made:
            listening.close()


@attrs.define(eq=False)
class Doors:
    """A gateway whose own dialing is real, and all its doors that take a URL."""

    app: Starlette
    client: httpx2.AsyncClient
    resolver: Resolver
    minutes: int = 0
    """How many minutes more have passed than really did: limits per minute are over by then."""

    async def sign_in(self) -> dict[str, str]:
        """Sign in as a browser does, and return what its forms hold besides their fields."""
        page = await self.client.get("/login")
        token = re.search(r'name="form_token" value="([^"]+)"', page.text)
        assert token is not None
        form = {"form_token": token[1], "key": ADMIN_KEY}
        answer = await self.client.post("/login", data=form, headers={"origin": "http://gateway"})
        assert answer.status_code == 303, answer.text
        return {"csrf": (await self.client.get("/session")).json()["token"]}

    @property
    def gateway(self) -> Gateway:
        """The engine."""
        gateway: Gateway = self.app.state.gateway
        return gateway

    async def call(self, method: str, path: str, body: Any) -> httpx2.Response:
        """Call the admin API."""
        return await self.client.request(method, path, json=body, headers={"x-api-key": ADMIN_KEY})

    async def plant(self, url: str, model: str = "tiny") -> Server:
        """Put a server into the registry past all checks, and as healthy: as an older version or a changed policy may have left it."""
        server = Server(
            id=ServerId(str(uuid.uuid5(uuid.NAMESPACE_URL, model))),
            model_name=model,
            endpoint_url=url,
            registered_at=0.0,
            created_at=0.0,
            updated_at=0.0,
        )
        passed = ProbeResult(server_id=server.id, generation=1, passed=True, checked_at=self.gateway.wall(), duration=0.1)
        await self.gateway.adopt(server, passed)
        return server


@asynccontextmanager
async def doors(**settings: Any) -> AsyncIterator[Doors]:
    """Run the whole application in this process, without its own listener; its resolver is ours, and its probes only ours."""
    resolver = Resolver()
    given = {"admin_api_key": ADMIN_KEY, "rate_limit_per_minute": 0, "connect_timeout_seconds": 1, "health_check_interval_seconds": 300}
    there: list[Doors] = []
    now = lambda: time.monotonic() + 60 * (there[0].minutes if there else 0)  # noqa: E731
    app = create_app(Settings(**{**given, **settings}), store=MemoryStore(), resolve=resolver, now=now)
    async with lifespan(app), httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        there.append(Doors(app, client, resolver))
        yield there[0]


async def test_no_payload_gets_through_any_door() -> None:
    """X01: register, PUT, test-connection and import; each answer is a refusal in words, and nothing at all is connected to."""
    async with doors() as there:
        with counters() as listeners:
            urls = payloads(listeners.port)
            assert len(set(urls)) >= 120
            there.resolver.answers["public.example"] = [["93.184.215.14"]]
            kept = await there.plant("http://public.example:8000", "kept")
            for url in urls:
                body = {"model_name": "tiny", "endpoint_url": url}
                answer = await there.call("POST", "/admin/register", body)
                assert answer.status_code in (400, 503), (url, answer.text)
                assert "connection" not in answer.json()["error"]["message"] or "refused" not in answer.text, (url, answer.text)
                answer = await there.call("PUT", f"/admin/register/{kept.id}", {"endpoint_url": url})
                assert answer.status_code in (400, 503), (url, answer.text)
            assert listeners.connections() == 0
            assert [server.endpoint_url for server in (await there.gateway.store.load()).servers] == ["http://public.example:8000"]


async def test_no_payload_gets_through_a_connection_test() -> None:
    """X01: the answer is a category and tells nothing about what is there; ten tests a minute are not a port scanner."""
    with counters() as listeners:
        urls = payloads(listeners.port)
        said = set()
        for start in range(0, len(urls), 10):
            async with doors() as there:
                for url in urls[start : start + 10]:
                    answer = await there.call("POST", "/admin/test-connection", {"model_name": "tiny", "endpoint_url": url})
                    assert answer.status_code in (200, 400), (url, answer.text)
                    if answer.status_code == 200:
                        assert not answer.json()["ok"]
                        said.add(answer.json()["reason"])
                answer = await there.call("POST", "/admin/test-connection", {"model_name": "tiny", "endpoint_url": urls[0]})
                assert answer.status_code in (400, 429)
        assert listeners.connections() == 0
        assert not [reason for reason in said if str(listeners.port) in reason]


@pytest.mark.parametrize(
    ("address", "names_setting"),
    [("10.1.2.3", True), ("127.0.0.1", True), ("fd00::7", True), ("169.254.169.254", False), ("192.0.2.1", False), ("fe80::1", False)],
)
async def test_a_name_that_leads_to_a_closed_address_is_told_what_would_open_it(address: str, names_setting: bool) -> None:
    """Wherever a URL is given and tried; nobody is told that the URL can be used, nor of a setting that would not help."""
    async with doors() as there:
        there.resolver.answers["gpu.example"] = [[address]]
        body = {"model_name": "tiny", "endpoint_url": "http://gpu.example:8100"}
        tested = (await there.call("POST", "/admin/test-connection", body)).json()
        registered = (await there.call("POST", "/admin/register", body)).json()["error"]["message"]
        server = await there.plant("http://gpu.example:8100")
        checked = (await there.call("POST", f"/admin/servers/{server.id}/health-check", None)).json()["reason"]
        form = {**await there.sign_in(), "endpoint_url": body["endpoint_url"]}
        page = (await there.client.post("/register/test", data=form, headers={"origin": "http://gateway"})).text
        assert (tested["ok"], [(step["step"], step["ok"]) for step in tested["steps"]]) == (False, [("address", False)])
        assert "can be used" not in str(tested)
        for text in (tested["reason"], tested["steps"][0]["message"], registered, checked, page):
            assert "does not connect to" in text
            assert ("ALLOW_PRIVATE_NETWORKS" in text) is names_setting, text
        assert address not in f"{tested} {registered} {checked}"
        assert re.search(r'<li class="bad">.*<strong>Address allowed</strong>', page)
        assert not re.search(r'<li class="good">.*<strong>Address allowed</strong>', page)


async def test_a_request_refused_by_address_leaves_a_reason_that_names_the_setting() -> None:
    """On the record of the server, where its host reads it."""
    async with doors() as there:
        there.resolver.answers["gpu.example"] = [["10.1.2.3"]]
        server = await there.plant("http://gpu.example:8100")
        assert (await there.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})).status_code == 504
        record = (await there.call("GET", f"/admin/servers/{server.id}", None)).json()
        assert "ALLOW_PRIVATE_NETWORKS" in record["reason"]


async def test_no_payload_gets_through_import_or_its_later_probe() -> None:
    """X01: literals are refused at once, and of the names that are taken the probe refuses all."""
    async with doors() as there:
        with counters() as listeners:
            taken = 0
            for url in payloads(listeners.port):
                answer = await there.call("POST", "/admin/import", {"servers": [{"model_name": "tiny", "endpoint_url": url}]})
                assert answer.status_code in (200, 400), (url, answer.text)
                taken += answer.status_code == 200
            servers = (await there.gateway.store.load()).servers
            assert len(servers) == taken > len(CLOSED) / 2
            for server in servers:
                result = await there.gateway.checks.check(server)
                assert not result.passed
            assert listeners.connections() == 0


async def test_no_payload_gets_through_the_relay() -> None:
    """X01: even one that stands in the registry as healthy is not dialed, neither for a request nor by a probe."""
    async with doors() as there:
        with counters() as listeners:
            urls = payloads(listeners.port)[: 2 * len(CLOSED)]

            async def ask(number: int, url: str) -> None:
                model = f"model-{number}"
                server = await there.plant(url, model)
                answer = await there.client.post("/v1/chat/completions", json={"model": model, "messages": []})
                assert answer.status_code == 504, (url, answer.text)
                assert answer.headers["x-multiverse-attempts"] >= "1"
                assert not (await there.gateway.checks.check(server)).passed

            async with anyio.create_task_group() as group:
                for number, url in enumerate(urls):
                    group.start_soon(ask, number, url)
            assert listeners.connections() == 0


async def test_no_payload_gets_through_the_pages() -> None:
    """X01: the forms that register, test, recognize and change a server take no other way; nothing is saved or connected to."""
    async with doors() as there:
        there.resolver.answers["public.example"] = [[]]
        kept = await there.plant("http://public.example:8000", "kept")
        proof = await there.sign_in()
        with counters() as listeners:
            for url in payloads(listeners.port):
                form = {"model_name": "tiny", "endpoint_url": url, "streaming": "on", **proof}
                there.minutes += 1
                for path in ("/register", "/register/test", "/register/address", f"/server/{kept.id}/edit"):
                    answer = await there.client.post(path, data=form, headers={"origin": "http://gateway"})
                    assert answer.status_code in (200, 400, 422, 503), (path, url, answer.status_code)
            assert listeners.connections() == 0
        assert [server.endpoint_url for server in (await there.gateway.store.load()).servers] == ["http://public.example:8000"]


async def test_one_bad_answer_condemns_a_name() -> None:
    """X01: of a mixed answer not even the good address is dialed, wherever the bad one stands."""
    async with doors() as there:
        with counters() as listeners:
            for mixed in (["93.184.215.14", "127.0.0.1"], ["127.0.0.1", "93.184.215.14"], ["::ffff:127.0.0.1"], [], ["127.0.0.1%lo"]):
                there.resolver.answers["mixed.example"] = [mixed]
                body = {"model_name": "tiny", "endpoint_url": f"http://mixed.example:{listeners.port}"}
                answer = await there.call("POST", "/admin/register", body)
                assert answer.status_code == 503, answer.text
            assert listeners.connections() == 0


async def test_a_name_that_turns_is_caught_at_the_next_connect() -> None:
    """X01, rebinding: good at registration, loopback for the next request; what was checked once counts for nothing."""
    backend = Backend("good", models=("tiny",))
    async with backend, doors(allow_private_networks="127.0.0.9/32") as there:
        assert "127.0.0.9" not in backend.host
        there.resolver.answers["turning.example"] = [["127.0.0.9"], ["127.0.0.1"]]
        body = {"model_name": "tiny", "endpoint_url": f"http://turning.example:{backend.port}"}
        first = await there.call("POST", "/admin/register", body)
        assert first.status_code == 503, "nobody listens on 127.0.0.9"
        await there.plant(f"http://turning.example:{backend.port}")
        answer = await there.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
        assert answer.status_code in (503, 504)
        assert there.resolver.asked.count("turning.example") >= 2, "each connect asks again"
        assert backend.connections == 0


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_leads_nowhere(code: int) -> None:
    """X01: neither a probe nor a request follows it, and no answer shows where it points."""
    with counters() as listeners:
        away = behaviours.redirect(f"http://127.0.0.1:{listeners.port}/v1/models", code=code)
        good = Backend("good", models=("tiny",))
        async with good, doors(allow_private_networks="true") as there:
            body = {"model_name": "tiny", "endpoint_url": good.url}
            assert (await there.call("POST", "/admin/register", body)).status_code == 201
            good.behave = good.behave_models = away
            answer = await there.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
            assert answer.status_code == 502
            assert str(listeners.port) not in f"{answer.headers}{answer.text}"
            (server,) = (await there.gateway.store.load()).servers
            assert not (await there.gateway.checks.check(server)).passed
            assert (await there.call("POST", "/admin/register", body)).status_code == 503
        assert listeners.connections() == 0


async def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """X01: a proxy would dial for us, unchecked."""
    good = Backend("good", models=("tiny",))
    with counters() as listeners:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listeners.port}")
        async with good, doors(allow_private_networks="true") as there:
            assert (await there.call("POST", "/admin/register", {"model_name": "tiny", "endpoint_url": good.url})).status_code == 201
            answer = await there.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
            assert answer.status_code == 200
        assert listeners.connections() == 0


@pytest.mark.e2e
def test_the_gateway_does_not_talk_to_itself() -> None:
    """X01: its own listener is refused by every spelling; through somebody else's port, the first round ends with 508."""
    with GatewayProcess() as gateway:
        for host in ("127.0.0.1", "localhost", "a.localhost"):
            answer = gateway.admin("POST", "/register", {"model_name": "loop", "endpoint_url": f"http://{host}:{gateway.port}"})
            assert answer.status_code == 400, answer.text
            assert "itself" in answer.text
        looped = gateway.call("POST", "/v1/chat/completions", {"model": "loop", "messages": []}, headers={"x-multiverse-hop": "1"})
        assert looped.status_code == 508
        assert looped.headers["x-should-retry"] == "false"
        around = FaultProxy(gateway.port)
        with serving(around):
            answer = gateway.admin("POST", "/register", {"model_name": "loop", "endpoint_url": around.url})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "probe_failed")
            assert "508" in answer.text, "the probe came back to ourselves"
