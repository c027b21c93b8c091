"""Deployments for the end-to-end tests: scripted servers that are registered for a model of their own at a gateway that all tests share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import httpx2

from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.raw_client import RawClient
from support.sockets import serving, wait_until

FIRST_BYTE_SECONDS = 2.0
IDLE_SECONDS = 1.0
STREAM_SECONDS = 4.0
STREAM_BYTES = 4 << 20
BODY_BYTES = 1 << 20
IMPATIENT: Mapping[str, str | None] = {
    "FIRST_BYTE_TIMEOUT_SECONDS": f"{FIRST_BYTE_SECONDS:g}",
    "CONNECT_TIMEOUT_SECONDS": "1",
    "IDLE_TIMEOUT_SECONDS": f"{IDLE_SECONDS:g}",
    "HEALTH_CHECK_TIMEOUT_SECONDS": "2",
    "MAX_BODY_BYTES": str(BODY_BYTES),
    "MULTIVERSE_MAX_STREAM_SECONDS": f"{STREAM_SECONDS:g}",
    "MULTIVERSE_MAX_STREAM_BYTES": str(STREAM_BYTES),
    "MULTIVERSE_COUNT_STREAM_TOKENS": "false",  # what is sent and answered is compared byte for byte
}
"""Settings under which nothing has to be waited for long; the health interval stays at 60 s, so only what a test does counts."""

_numbers = itertools.count(1)


@attrs.frozen
class Deployment:
    """Servers of one model at the shared gateway."""

    gateway: GatewayProcess
    client: httpx2.Client
    model: str
    backends: tuple[Backend, ...]
    ids: tuple[str, ...]

    def ask(self, *, stream: bool = False, **fields: Any) -> httpx2.Response:
        """Ask for a chat completion."""
        return self.client.post("/v1/chat/completions", json=self.body(stream=stream, **fields))

    def ask_until_tried(self, backend: Backend, *, stream: bool = False) -> httpx2.Response:
        """Ask until `backend` got one more request, and return the answer to the one that it got."""
        before = backend.hits
        for _ in range(2 * len(self.backends)):
            answer = self.ask(stream=stream)
            if backend.hits > before:
                return answer
            assert answer.status_code == 200, answer.text
        raise AssertionError(f"{backend.name} was not tried")

    def record(self, number: int = 0) -> dict[str, Any]:
        """Return the record of a server."""
        record: dict[str, Any] = self.client.get(f"/admin/servers/{self.ids[number]}").json()
        return record

    def state(self, number: int = 0) -> str:
        """Return the state of a server's health."""
        return str(self.record(number)["state"])

    def keep_down(self) -> None:
        """Let no probe pass from now on: who is found unhealthy stays so, however slow this machine is."""
        for backend in self.backends:
            backend.behave_models = behaviours.status(500)

    def in_flight(self) -> int:
        """Return how many slots of the servers are taken."""
        return sum(int(self.record(number)["in_flight"]) for number in range(len(self.ids)))

    def wait_for_quiet(self, *, within: float = 1.0) -> None:
        """Wait until no slot is taken."""
        wait_until(lambda: self.in_flight() == 0, within=within, what="a slot leaked")

    def body(self, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
        """Return the body of a request."""
        return {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "stream": stream, **fields}

    def begin(self, client: RawClient, *, stream: bool = False, **fields: Any) -> None:
        """Send a request on a raw connection, and read nothing."""
        client.request("POST", "/v1/chat/completions", json=self.body(stream=stream, **fields))


def operator(gateway: GatewayProcess) -> httpx2.Client:
    """Return a client with the admin key, which costs less than a new connection for every call."""
    transport = httpx2.HTTPTransport(verify=False, trust_env=False)
    return httpx2.Client(transport=transport, base_url=gateway.url, headers={"x-api-key": gateway.admin_key}, timeout=30.0)


@contextmanager
def deployed(gateway: GatewayProcess, client: httpx2.Client, *backends: Backend, **fields: Any) -> Iterator[Deployment]:
    """Run the backends on one thread, register them in order for a model that nobody else has, and remove them at the end."""
    name = f"deployment-{next(_numbers)}"
    ids: list[str] = []
    with serving(*backends):
        try:
            for backend in backends:
                answer = client.post("/admin/register", json={"model_name": name, "endpoint_url": backend.url, **fields})
                assert answer.status_code == 201, answer.text
                ids.append(answer.json()["registration_id"])
            yield Deployment(gateway, client, name, backends, tuple(ids))
        finally:
            for registration in ids:
                client.delete(f"/admin/register/{registration}")


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """Return the error object of an answer, after checking that it is a proper one."""
    assert answer.headers["content-type"].partition(";")[0] == "application/json", answer.headers
    body = json.loads(answer.content)
    assert list(body) == ["error"], body
    error = body["error"]
    assert isinstance(error, dict)
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert error["message"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["param"], str | None)
    assert isinstance(error["code"], str | None)
    for secret in ("Traceback", "127.0.0.1", "/src/", ".py"):
        assert secret not in error["message"]
    return error
