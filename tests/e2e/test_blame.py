"""What the requests of one client, and of several, make the gateway think of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from e2e.scene import Scene
from support import behaviours
from support.backends import Backend, Exchange, answer_well
from support.processes import DOORS, GatewayProcess
from support.sockets import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("door", DOORS, indirect=True)]


@contextmanager
def client_at(gateway: GatewayProcess, address: str) -> Iterator[httpx2.Client]:
    """Return a client whose connections come from this address of the loopback network."""
    transport = httpx2.HTTPTransport(local_address=address, trust_env=False)
    with httpx2.Client(transport=transport, base_url=gateway.url, timeout=20.0) as client:
        yield client


def ask(client: httpx2.Client, scene: Scene, content: str = "Hello", *, stream: bool = False, **headers: str) -> httpx2.Response:
    """Ask for a chat completion."""
    body = scene.body(stream=stream, messages=[{"role": "user", "content": content}])
    return client.post("/v1/chat/completions", json=body, headers=headers)


async def poisonable(exchange: Exchange) -> None:
    """Answer well, but for one prompt."""
    if b"poison" in exchange.request.body:
        await behaviours.status(500)(exchange)
    else:
        await answer_well(exchange)


@pytest.mark.parametrize("stream", [False, True])
def test_a_constant_request_id_keeps_no_broken_server_in_rotation(stage: Callable[..., Scene], stream: bool) -> None:
    """S12: strikes are told apart by numbers of the gateway's own: the id of a request is the client's to choose."""
    broken, sound = Backend("broken", behaviours.status(500)), Backend("sound")
    scene = stage(broken, sound)
    with client_at(scene.gateway, "127.0.0.1") as one, client_at(scene.gateway, "127.0.0.2") as other:
        for _ in range(12):
            for client in (one, other):
                assert ask(client, scene, stream=stream, **{"X-Request-Id": "constant"}).status_code == 200
    assert broken.hits <= 4
    assert scene.record()["consecutive_failures"] == 0


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_the_prompts_of_one_client_take_no_server_away(stage: Callable[..., Scene], fields: dict[str, Any]) -> None:
    """S4: a prompt that every server fails on, again and again: everybody else is served, by all of them, as if nothing had happened."""
    scene = stage(Backend("one", poisonable), Backend("two", poisonable))
    with client_at(scene.gateway, "127.0.0.1") as attacker, client_at(scene.gateway, "127.0.0.2") as other:
        for _ in range(8):
            assert ask(attacker, scene, "poison", **fields).status_code == 504
            assert ask(other, scene, **fields).status_code == 200
        for _ in range(8):
            assert ask(attacker, scene, "poison", **fields).status_code == 504
        assert [scene.state(number) for number in range(2)] == ["healthy", "healthy"]
        assert ask(other, scene, **fields).status_code == 200


def test_a_server_that_fails_for_one_client_only_is_chosen_last(stage: Callable[..., Scene]) -> None:
    """Three strikes of one client: others still get through, by servers without strikes first; a failure of another client takes it out."""
    broken, sound = Backend("broken", behaviours.status(500)), Backend("sound")
    scene = stage(broken, sound)
    with client_at(scene.gateway, "127.0.0.1") as one, client_at(scene.gateway, "127.0.0.2") as other:
        for _ in range(8):
            assert ask(one, scene).status_code == 200
        assert (broken.hits, scene.state()) == (3, "healthy")
        assert all(ask(other, scene).status_code == 200 for _ in range(4))
        assert broken.hits == 3
        sound.behave = behaviours.status(500)
        assert ask(other, scene).status_code == 504
        wait_until(lambda: scene.state() != "healthy", within=2.0, what="the broken server was not taken out")
