"""Gateways inside other ASGI applications."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from multiverse_gateway import Settings, create_app, lifespan
from support.backends import Backend

pytestmark = pytest.mark.e2e

KEYS = {"/first": "the-first-gateways-key", "/deep/second": "the-second-gateways-key"}
ASK = {"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]}


async def front(request: Request) -> Response:
    """Answer as the parent application itself."""
    return PlainTextResponse("the parent")


def parent(gateways: dict[str, Starlette]) -> Starlette:
    """Make an application of our own with gateways under prefixes."""

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        first, second = gateways.values()
        async with lifespan(first), lifespan(second):
            yield

    mounts = [Mount(prefix, app=gateway) for prefix, gateway in gateways.items()]
    return Starlette(routes=[Route("/", front), *mounts], lifespan=running)


@pytest.fixture
def gateways(tmp_path: Path) -> dict[str, Starlette]:
    """Make two gateways with databases of their own."""
    made = {}
    for number, (prefix, key) in enumerate(KEYS.items()):
        database = f"sqlite:///{(tmp_path / f'{number}.db').as_posix()}"
        made[prefix] = create_app(
            Settings(
                admin_api_key=key, allow_private_networks="true", rate_limit_per_minute=0, count_stream_tokens=False, database_url=database
            )
        )
    return made


async def test_two_gateways_in_one_application(gateways: dict[str, Starlette]) -> None:
    """Each under its prefix, with its own servers, keys and counts; the parent's own pages stay the parent's."""
    app = parent(gateways)
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://parent")
    async with Backend("one") as one, Backend("two") as two, app.router.lifespan_context(app), client:
        for (prefix, key), backend in zip(KEYS.items(), (one, two), strict=True):
            registration = {"model_name": "test-model", "endpoint_url": backend.url}
            answer = await client.post(f"{prefix}/admin/register", json=registration, headers={"x-api-key": key})
            assert answer.status_code == 201, answer.text
        for prefix, backend in zip(KEYS, (one, two), strict=True):
            plain = await client.post(f"{prefix}/v1/chat/completions", json=ASK)
            assert plain.content == bytes(backend.last.payload)
            assert backend.last.path == "/v1/chat/completions"
            stream = await client.post(f"{prefix}/v1/chat/completions", json={**ASK, "stream": True})
            assert stream.content == bytes(backend.last.payload)
            listed = (await client.get(f"{prefix}/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["test-model"]
            assert (await client.get(f"{prefix}/readyz")).status_code == 200
            refused = await client.post(f"{prefix}/v1/chat/completions", json={**ASK, "model": "other"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert (one.hits, two.hits) == (2, 2)
        wrong = await client.get("/first/admin/servers", headers={"x-api-key": KEYS["/deep/second"]})
        assert wrong.status_code == 403
        assert (await client.get("/first/admin/servers")).status_code == 403
        assert (await client.get("/")).text == "the parent"
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 404
    assert (one.open_connections, two.open_connections) == (0, 0)


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("POST", "/v1/embeddings"), ("GET", "/readyz")])
async def test_without_its_lifespan_a_gateway_says_so(gateways: dict[str, Starlette], method: str, path: str) -> None:
    """503, to be tried again, before its start and after its end."""
    first = gateways["/first"]
    outer = Starlette(routes=[Mount("/first", app=first)])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(outer), base_url="http://parent") as client:
        before = await client.request(method, f"/first{path}", json=ASK)
        async with lifespan(first):
            pass
        after = await client.request(method, f"/first{path}", json=ASK)
    for answer in (before, after):
        assert answer.status_code == 503
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert int(answer.headers["retry-after"]) >= 1
