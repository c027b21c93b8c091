"""The `openai` library as everybody has it, against two real llama.cpp servers behind the gateway, over HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
import httpx2
import openai
import pytest

from e2e.conftest import TlsGateway
from e2e.deployment import IMPATIENT, Deployment
from support import answers, behaviours
from support.backends import Backend
from support.processes import GatewayProcess, LlamaServer

pytestmark = pytest.mark.e2e

Deploy = Callable[..., Deployment]
Http = Literal["1.1", "2", "1.1 with TLS", "2 with TLS"]
HTTPS: tuple[Http, ...] = ("1.1", "2", "1.1 with TLS", "2 with TLS")
MODEL = "tiny"


@pytest.fixture(scope="module")
def plain(llamas: tuple[LlamaServer, LlamaServer]) -> Iterator[GatewayProcess]:
    """Return a gateway in front of both model servers."""
    with GatewayProcess(IMPATIENT) as gateway:
        for llama in llamas:
            gateway.register(MODEL, llama.url)
        yield gateway


@pytest.fixture(scope="module")
def secure(llamas: tuple[LlamaServer, LlamaServer], certificate: tuple[Path, Path]) -> Iterator[TlsGateway]:
    """Return the same with TLS."""
    with TlsGateway(*certificate) as gateway:
        with httpx2.Client(verify=gateway.trust, trust_env=False, base_url=gateway.url) as client:
            for llama in llamas:
                registration = {"model_name": MODEL, "endpoint_url": llama.url}
                answer = client.post("/admin/register", json=registration, headers={"x-api-key": gateway.admin_key})
                assert answer.status_code == 201, answer.text
        yield gateway


@attrs.frozen
class Line:
    """Where clients connect, and how."""

    http: Http
    gateway: GatewayProcess

    @property
    def options(self) -> dict[str, Any]:
        """What makes an httpx2 client of this kind."""
        if isinstance(self.gateway, TlsGateway):
            return {"http2": self.http == "2 with TLS", "verify": self.gateway.trust, "trust_env": False}
        return {"http1": self.http == "1.1", "http2": self.http == "2", "trust_env": False}

    @property
    def version(self) -> str:
        """What answers say of themselves."""
        return "HTTP/1.1" if self.http.startswith("1.1") else "HTTP/2"


@pytest.fixture(params=HTTPS)
def line(request: pytest.FixtureRequest) -> Line:
    """Choose a kind of connection."""
    return Line(request.param, request.getfixturevalue("secure" if "TLS" in request.param else "plain"))


@pytest.fixture
def client(line: Line) -> Iterator[openai.OpenAI]:
    """Return the client as a user makes it; over HTTP/2 with an own HTTP client."""
    if line.http == "1.1":
        with openai.OpenAI(base_url=line.gateway.base_url, api_key="anything", max_retries=0) as made:
            yield made
        return
    http = httpx2.Client(**line.options)
    with openai.OpenAI(base_url=line.gateway.base_url, api_key="anything", max_retries=0, http_client=http) as made:
        yield made


@pytest.fixture
async def async_client(line: Line) -> AsyncIterator[openai.AsyncOpenAI]:
    """Return the asynchronous client."""
    if line.http == "1.1":
        async with openai.AsyncOpenAI(base_url=line.gateway.base_url, api_key="anything", max_retries=0) as made:
            yield made
        return
    http = httpx2.AsyncClient(**line.options)
    async with openai.AsyncOpenAI(base_url=line.gateway.base_url, api_key="anything", max_retries=0, http_client=http) as made:
        yield made


def test_everyday_calls(client: openai.OpenAI, line: Line, llamas: tuple[LlamaServer, LlamaServer]) -> None:
    """TC-INF-001, TC-INF-005: models, chat, streams with and without usage, and completions say what the server itself says."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL

    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0, seed=1
    )
    assert raw.http_response.http_version == line.version
    assert raw.headers["x-gateway-server-id"]
    assert raw.request_id
    chat = raw.parse()
    said = chat.choices[0].message.content
    assert said == direct(llamas[0])
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 12

    with client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12

    without = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4, stream=True)
    assert all(chunk.choices for chunk in without)

    completion = client.completions.create(model=MODEL, prompt="hello", max_tokens=8)
    assert completion.choices[0].text
    texts = [part.choices[0].text for part in client.completions.create(model=MODEL, prompt="hello", max_tokens=8, stream=True)]
    assert "".join(texts)


async def test_everyday_calls_asynchronously(async_client: openai.AsyncOpenAI, line: Line, llamas: tuple[LlamaServer, LlamaServer]) -> None:
    """The same with the asynchronous client, which reads to the end of each body."""
    assert [model.id async for model in async_client.models.list()] == [MODEL]
    chat = await async_client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0, seed=1
    )
    said = chat.choices[0].message.content
    stream = await async_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert chunks[-1].usage is not None
    completion = await async_client.completions.create(model=MODEL, prompt="hello", max_tokens=8)
    assert completion.choices[0].text


def direct(llama: LlamaServer) -> str:
    """Ask a model server itself."""
    with openai.OpenAI(base_url=f"{llama.url}/v1", api_key="anything") as client:
        chat = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0, seed=1
        )
    content = chat.choices[0].message.content
    assert content is not None
    return content


def test_requests_alternate(client: openai.OpenAI, llamas: tuple[LlamaServer, LlamaServer]) -> None:
    """TC-INF-007: both servers serve."""
    used = [
        client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=1
        ).headers["x-gateway-server-id"]
        for _ in range(4)
    ]
    assert len(set(used)) == 2
    assert used[0] == used[2] != used[1] == used[3]


def test_an_unknown_model(client: openai.OpenAI) -> None:
    """TC-INF-002: NotFoundError names the models there are."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="tinny", messages=[{"role": "user", "content": "hello"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_a_servers_400_is_relayed_byte_for_byte(client: openai.OpenAI, llamas: tuple[LlamaServer, LlamaServer]) -> None:
    """The server's own words, for the client that made the mistake."""
    wrong: Any = "not a list"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=wrong)
    own = httpx2.post(
        f"{llamas[0].url}/v1/chat/completions", content=json.dumps({"messages": wrong, "model": MODEL}).encode(), trust_env=False
    )
    assert own.status_code == 400
    assert caught.value.response.content == own.content
    assert caught.value.response.headers["content-type"] == own.headers["content-type"]


async def test_errors_reach_the_asynchronous_client(async_client: openai.AsyncOpenAI) -> None:
    """As the other one."""
    with pytest.raises(openai.NotFoundError):
        await async_client.chat.completions.create(model="tinny", messages=[{"role": "user", "content": "hello"}])
    wrong: Any = "not a list"
    with pytest.raises(openai.BadRequestError):
        await async_client.chat.completions.create(model=MODEL, messages=wrong, stream=True)


def test_nobody_is_there(deploy: Deploy, gateway: GatewayProcess) -> None:
    """TC-INF-003: 503 with the time to wait, at once."""
    deployment = deploy(Backend("gone"))
    deployment.backends[0].crash()
    assert deployment.client.post(f"/admin/servers/{deployment.ids[0]}/health-check").json()["passed"] is False
    with (
        openai.OpenAI(base_url=gateway.base_url, api_key="x", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model=deployment.model, messages=[{"role": "user", "content": "hello"}])
    assert caught.value.status_code == 503
    assert caught.value.code == "no_healthy_server"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather — °C",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]
CALLED = (
    b'{ "id":"chatcmpl-1", "object":"chat.completion", "created":1700000000, "model":"other-name",\n'
    b'  "choices":[{"index":0,"finish_reason":"tool_calls","message":{"role":"assistant","content":null,"reasoning_content":"\xc3\xa4h",'
    b'"tool_calls":[{"id":"call_1","type":"function","function":{"name":"weather","arguments":"{\\"city\\": \\"K\\u00f6ln\\"}"}}]}}],'
    b' "usage":{"prompt_tokens":1,"completion_tokens":1.0,"total_tokens":2e0}, "unknown":{"kept":[1,2,3]} }\n'
)


@pytest.mark.parametrize("http", ["1.1", "2"])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_pass_byte_for_byte(deploy: Deploy, gateway: GatewayProcess, http: str, stream: bool) -> None:
    """FR-ROUTE-005, FR-API-INF-003, 007: what the client sends reaches the server, and back, as the very same bytes; its key does not."""
    sent: list[bytes] = []
    events = [b'data: {"choices":[{"index":0,"finish_reason":"tool_calls","delta":{"x":1.50}}]}\n\n', b": c\r\n\r\n", answers.DONE]
    reply = behaviours.stream(events) if stream else behaviours.answer(200, CALLED)
    deployment = deploy(Backend("tools", reply))
    transport = httpx2.HTTPTransport(http1=http == "1.1", http2=http == "2", verify=False, trust_env=False)
    hooked = httpx2.Client(transport=transport, event_hooks={"request": [lambda request: sent.append(request.read())]})
    with openai.OpenAI(base_url=gateway.base_url, api_key="sk-my-own-secret", http_client=hooked) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=deployment.model,
            messages=[{"role": "user", "content": "Wetter in Köln? \U0001f327"}],
            tools=TOOLS,
            tool_choice="auto",
            parallel_tool_calls=False,
            response_format={"type": "json_object"},
            extra_body={"grammar": "root ::= .*", "model_kwargs": {"model": "decoy", "stream": True}},
            extra_headers={"cookie": "session=mine", "x-api-key": "sk-my-own-secret", "x-forwarded-for": "1.2.3.4"},
            stream=stream,
        )
        assert raw.http_response.read() == (b"".join(events) if stream else CALLED)
    received = deployment.backends[0].last
    assert received.body == sent[0]
    assert received.path == "/v1/chat/completions"
    headers = dict(received.headers)
    assert headers.keys().isdisjoint({"authorization", "cookie", "x-api-key", "x-forwarded-for"})
    assert "sk-my-own-secret" not in str(received.headers)
