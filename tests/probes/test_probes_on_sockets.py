"""Both probes against backends that misbehave, through the gateway's own door."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from multiverse_gateway import AddressPolicy, HealthProbe, ProbeResult, Settings
from multiverse_gateway.probes import chat, models
from multiverse_gateway.relay.transport import WireTransport
from multiverse_gateway.relay.wire import Wire
from multiverse_gateway.testing.probe import make_server
from support import behaviours as act
from support.backends import Backend, Behaviour
from support.sockets import free_port

pytestmark = pytest.mark.e2e

PROBES: dict[str, HealthProbe] = {"models": models.create(Settings()), "chat": chat.create(Settings())}


@pytest.fixture
async def http(request: pytest.FixtureRequest) -> AsyncIterator[httpx2.AsyncClient]:
    """Make a client over the wire; with the parameter false, private addresses are closed."""
    policy = AddressPolicy(allow_private=getattr(request, "param", True))
    wire = Wire(policy=lambda: policy)
    async with httpx2.AsyncClient(transport=WireTransport(wire), trust_env=False, timeout=None) as client:
        yield client
    await wire.aclose()


async def check(http: httpx2.AsyncClient, probe: str, url: str) -> ProbeResult:
    """Probe the server at the URL."""
    return await PROBES[probe].check(make_server(endpoint_url=url, model_name="test-model"), http)


@pytest.mark.parametrize("probe", PROBES)
async def test_a_good_server_passes(http: httpx2.AsyncClient, probe: str) -> None:
    with Backend() as backend:
        result = await check(http, probe, backend.url)
        assert (result.passed, result.reason, result.warning) == (True, None, None)
        [asked] = [*backend.probes, *backend.requests]
        assert asked.header("authorization") == "Bearer the-key-of-the-server"
        assert asked.header("accept-encoding") == "identity"


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (act.status(500), "status 500"),
        (act.loading(), "loading"),
        (act.redirect("http://elsewhere.example/"), "redirect"),
        (act.html_page(), "not JSON"),
        (act.cloudflared_530(), "tunnel"),
        (act.broken_json(), "not JSON"),
        (act.reset_first(), "broke"),
        (act.eof_first(), "broke"),
        (act.garbage(), "broke"),
        (act.truncated_body(), "broke"),
        (act.big_header(), "broke"),
        (act.gzip_bomb(), "compressed"),
        (act.huge_model_list(), "1 MiB"),
        (act.unauthorized(), "api_key"),
    ],
)
async def test_what_is_wrong_is_said_in_words(http: httpx2.AsyncClient, probe: str, behave: Behaviour, words: str) -> None:
    with Backend(behave=behave, behave_models=behave) as backend:
        result = await check(http, probe, backend.url)
    assert not result.passed
    assert words in (result.reason or "")
    assert result.unauthorized == (words == "api_key")


@pytest.mark.parametrize("probe", PROBES)
async def test_a_refused_connection_is_told_apart(http: httpx2.AsyncClient, probe: str) -> None:
    result = await check(http, probe, f"http://127.0.0.1:{free_port()}")
    assert "is the server running" in (result.reason or "")


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("http", [False], indirect=True)
async def test_a_closed_address_is_told_apart(http: httpx2.AsyncClient, probe: str) -> None:
    """The words say what to do and nothing of what listens there."""
    with Backend() as backend:
        result = await check(http, probe, backend.url)
        assert "does not connect to" in (result.reason or "")
        assert backend.connections == 0
