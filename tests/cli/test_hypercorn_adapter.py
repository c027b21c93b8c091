"""The parts of hypercorn that connections are handed over to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from multiverse_gateway.cli.hypercorn_adapter import PARTS, incompatibility
from support.processes import GatewayProcess
from support.raw_client import RawClient
from support.sockets import wait_until


def test_this_hypercorn_fits() -> None:
    """If this fails after an upgrade, it says what changed: adapt `cli.hypercorn_adapter`, and compare `cli.hypercorn_hardening` too."""
    assert incompatibility() is None


def test_another_hypercorn_does_not() -> None:
    """What changed is named, so that the log tells it."""

    def part(app: Any, loop: Any) -> None: ...

    changed: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {"hypercorn.Part": (part, ("app", "config"))}
    assert incompatibility(changed) == "hypercorn.Part takes (app, loop), not (app, config)"
    assert set(PARTS) >= {"hypercorn.asyncio.tcp_server.TCPServer"}


@pytest.mark.e2e
def test_the_direct_door_can_be_switched_off() -> None:
    """Everything is served nonetheless, and the log says by whom."""
    with GatewayProcess({"MULTIVERSE_DIRECT_DOOR": "false"}) as gateway:
        assert gateway.call("POST", "/v1/chat/completions", {"model": "none"}).status_code == 404
        wait_until(lambda: "hypercorn serves all requests" in gateway.log_text())
        assert reasons(gateway) == ["", ""]


@pytest.mark.e2e
def test_both_serve_on_one_port() -> None:
    """The door's answers have a reason in their first line, hypercorn's have none; on one connection hypercorn follows the door."""
    with GatewayProcess() as gateway:
        assert reasons(gateway) == ["Not Found", ""]
        with RawClient(gateway.port) as client:
            for _ in range(2):
                assert client.fetch("POST", "/v1/chat/completions", json={"model": "none"}).reason == "Not Found"
            assert client.fetch("GET", "/v1/models").reason == ""
            assert client.fetch("POST", "/v1/chat/completions", json={"model": "none"}).reason == ""


def reasons(gateway: GatewayProcess) -> list[str]:
    """Return the reasons in the first lines of an inference request's answer, and of another's."""
    with RawClient(gateway.port) as one, RawClient(gateway.port) as other:
        asked = one.fetch("POST", "/v1/chat/completions", json={"model": "none"})
        return [asked.reason, other.fetch("GET", "/livez").reason]
