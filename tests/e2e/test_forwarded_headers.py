"""Which of a client's headers a server gets, by either door and in HTTP/2."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx2
import pytest

from e2e.deployment import Deployment
from support.backends import Backend
from support.processes import DOORS, GatewayProcess

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True, scope="module")]

NAMES = ("anthropic-version", "anthropic-beta", "openai-beta")


@pytest.fixture(scope="module")
def shared(shared_deployment: Callable[..., Deployment]) -> Deployment:
    """Return one deployment for all these tests."""
    return shared_deployment(Backend("well"))


@pytest.fixture(params=["1.1", "2"])
def client(request: pytest.FixtureRequest, gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """Return a client of one version of HTTP."""
    transport = httpx2.HTTPTransport(http1=request.param == "1.1", http2=request.param == "2", verify=False, trust_env=False)
    with httpx2.Client(transport=transport, base_url=gateway.url, timeout=30.0) as made:
        yield made


def ask(shared: Deployment, client: httpx2.Client, headers: list[tuple[str, str]], *, path: str, stream: bool) -> dict[str, list[str]]:
    """Ask with these headers and return those of the three that reached the server, with their values."""
    answer = client.post(path, json={**shared.body(stream=stream), "max_tokens": 5}, headers=headers)
    assert answer.status_code == 200, answer.text
    got: dict[str, list[str]] = {}
    for name, value in shared.backends[0].last.headers:
        if name in NAMES:
            got.setdefault(name, []).append(value)
    return got


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
def test_versions_and_betas_reach_the_server(shared: Deployment, client: httpx2.Client, path: str, stream: bool) -> None:
    """42: on every path, once each; they are one request's, not the next one's."""
    sent = [
        ("Anthropic-Version", "2023-06-01"),
        ("anthropic-beta", "a-2024-07-31,b"),
        ("anthropic-beta", "c"),
        ("openai-beta", "assistants=v2"),
    ]
    for _ in range(2):
        assert ask(shared, client, sent, path=path, stream=stream) == {
            "anthropic-version": ["2023-06-01"],
            "anthropic-beta": ["a-2024-07-31,b, c"],
            "openai-beta": ["assistants=v2"],
        }
        assert ask(shared, client, [], path=path, stream=stream) == {}


@pytest.mark.parametrize("value", ["a b", '"quoted"', "a;b", "x" * 1025, "a,,b", ""])
def test_what_is_no_list_of_words_stays_here(shared: Deployment, client: httpx2.Client, value: str) -> None:
    """The request is answered without it."""
    assert ask(shared, client, [("anthropic-beta", value), ("openai-beta", "a")], path="/v1/messages", stream=False) == {
        "openai-beta": ["a"]
    }
