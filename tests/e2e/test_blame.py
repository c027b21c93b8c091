"""What the requests of one client, and of several, make the gateway think of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import httpx2
import pytest

from e2e.deployment import Deployment
from support import behaviours
from support.backends import Backend, Behaviour, Exchange, answer_well
from support.processes import DOORS, GatewayProcess
from support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True)]


@contextmanager
def client_at(gateway: GatewayProcess, address: str) -> Iterator[httpx2.Client]:
    """Return a client whose connections come from this address of the loopback network."""
    transport = httpx2.HTTPTransport(local_address=address, trust_env=False)
    with httpx2.Client(transport=transport, base_url=gateway.url, timeout=20.0) as client:
        yield client


def ask(client: httpx2.Client, deployment: Deployment, content: str = "Hello", *, stream: bool = False, **headers: str) -> httpx2.Response:
    """Ask for a chat completion."""
    body = deployment.body(stream=stream, messages=[{"role": "user", "content": content}])
    return client.post("/v1/chat/completions", json=body, headers=headers)


def hits_of(backends: Iterable[Backend]) -> int:
    """Return how many requests the servers have had."""
    return sum(backend.hits for backend in backends)


def poisonable(then: Behaviour) -> Behaviour:
    """Answer well, but do something else for one prompt."""

    async def behave(exchange: Exchange) -> None:
        await (then if b"poison" in exchange.request.body else answer_well)(exchange)

    return behave


POISONS: dict[str, Behaviour] = {
    "fails": behaviours.status(500),
    "resets": behaviours.reset_first(),
    "hangs up": behaviours.eof_first(),
    "is garbage": behaviours.garbage(),
    "is cut": behaviours.truncated_body(),
    "is no JSON": behaviours.broken_json(),
    "breaks its stream": behaviours.reset_stream(),
    "is a web page": behaviours.html_page(),
    "has no such model": behaviours.answer(400, b'{"error": {"message": "the model \'poison\' does not exist"}}'),
    "knows no such call": behaviours.status(501),
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_constant_request_id_keeps_no_broken_server_in_rotation(deploy: Callable[..., Deployment], stream: bool) -> None:
    """S12: strikes are told apart by numbers of the gateway's own: the id of a request is the client's to choose."""
    broken, sound = Backend("broken", behaviours.status(500)), Backend("sound")
    deployment = deploy(broken, sound)
    with client_at(deployment.gateway, "127.0.0.1") as one, client_at(deployment.gateway, "127.0.0.2") as other:
        for _ in range(12):
            for client in (one, other):
                assert ask(client, deployment, stream=stream, **{"X-Request-Id": "constant"}).status_code == 200
    assert broken.hits <= 4
    assert deployment.record()["consecutive_failures"] == 0


@pytest.mark.parametrize("poison", POISONS)
def test_the_prompts_of_one_client_take_no_server_away(deploy: Callable[..., Deployment], poison: str) -> None:
    """S4: a prompt that every server fails on, again and again: everybody else is served as if nothing had happened."""
    behaviour = POISONS[poison]
    deployment = deploy(Backend("one", poisonable(behaviour)), Backend("two", poisonable(behaviour)))
    stream = poison == "breaks its stream"
    with client_at(deployment.gateway, "127.0.0.1") as attacker, client_at(deployment.gateway, "127.0.0.2") as other:
        for count in (1, 6):
            for _ in range(count):
                with suppress(httpx2.RemoteProtocolError):  # a stream that breaks
                    assert ask(attacker, deployment, "poison", stream=stream).status_code != 503
            assert ask(other, deployment, stream=stream).status_code == 200
        assert all(deployment.state(number) in ("healthy", "suspect") for number in range(2))


PAUSES = {
    "429": behaviours.status(429, retry_after=30),
    "503": behaviours.status(503, retry_after=30),
    "529": behaviours.status(529, retry_after=30),
    "200": behaviours.answer(200, b'{"error": {"code": 429, "message": "slow down"}}', headers=(("retry-after", "30"),)),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause", PAUSES)
def test_a_pause_for_one_client_is_none_for_others(deploy: Callable[..., Deployment], pause: str, stream: bool) -> None:
    """S4: a prompt that every server calls too much for now; but two clients that hear it are right, and then no server is asked."""
    backends = [Backend(name, poisonable(PAUSES[pause])) for name in ("one", "two")]
    deployment = deploy(*backends)
    with client_at(deployment.gateway, "127.0.0.1") as attacker, client_at(deployment.gateway, "127.0.0.2") as other:
        for _ in range(3):
            assert ask(attacker, deployment, "poison", stream=stream).status_code == int(pause.replace("200", "429"))
        assert hits_of(backends) == 2
        for _ in range(4):
            assert ask(other, deployment, stream=stream).status_code == 200
        assert ask(other, deployment, "poison", stream=stream).headers["retry-after"]
        before = hits_of(backends)
        for client in (attacker, other):
            assert "retry-after" in ask(client, deployment, stream=stream).headers
        assert hits_of(backends) == before


def test_a_server_that_fails_for_one_client_only_is_chosen_last(deploy: Callable[..., Deployment]) -> None:
    """Three strikes of one client: others still get through, by servers without strikes first; a failure of another client takes it out."""
    broken, sound = Backend("broken", behaviours.status(500)), Backend("sound")
    deployment = deploy(broken, sound)
    with client_at(deployment.gateway, "127.0.0.1") as one, client_at(deployment.gateway, "127.0.0.2") as other:
        for _ in range(8):
            assert ask(one, deployment).status_code == 200
        assert (broken.hits, deployment.state()) == (3, "healthy")
        assert all(ask(other, deployment).status_code == 200 for _ in range(4))
        assert broken.hits == 3
        sound.behave = behaviours.status(500)
        assert ask(other, deployment).status_code == 504
        wait_until(lambda: deployment.state() != "healthy", within=2.0, what="the broken server was not taken out")
