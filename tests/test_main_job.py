"""The main job in one process: real sockets to the servers, the gateway called as an ASGI application."""

import httpx2
import pytest

from multiverse_gateway import Settings, create_app, lifespan
from multiverse_gateway.stores.memory import MemoryStore
from support.backends import Backend
from support.sockets import until

pytestmark = pytest.mark.e2e

KEY = "an-admin-key-for-tests"
ASK = {"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]}


async def test_requests_are_spread_streamed_and_failed_over() -> None:
    """Two servers register and take turns; a stream arrives whole; when one dies, every request is answered by the other (F01)."""
    app = create_app(Settings(admin_api_key=KEY, allow_private_networks="true", rate_limit_per_minute=0), store=MemoryStore())
    with Backend("one") as one, Backend("two") as two:
        async with lifespan(app), httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
            for backend in (one, two):
                registration = {"model_name": "test-model", "endpoint_url": backend.url}
                assert (await client.post("/admin/register", json=registration, headers={"x-api-key": KEY})).status_code == 201
            answers = [await client.post("/v1/chat/completions", json=ASK) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert (one.hits, two.hits) == (2, 2)
            stream = await client.post("/v1/chat/completions", json={**ASK, "stream": True})
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.content.endswith(b"data: [DONE]\n\n")
            kept = app.state.gateway.network.wire.idle
            one.crash()
            await until(lambda: app.state.gateway.network.wire.idle < kept)  # or the first request might use the broken connection
            answers = [await client.post("/v1/chat/completions", json=ASK) for _ in range(6)]
            assert [answer.status_code for answer in answers] == [200] * 6
            assert max(int(answer.headers["x-multiverse-attempts"]) for answer in answers) == 2
            listed = (await client.get("/v1/models")).json()["data"]
            assert [(model["id"], model["total_servers"]) for model in listed] == [("test-model", 2)]
            assert (await client.post("/v1/chat/completions", json={**ASK, "model": "other"})).status_code == 404
