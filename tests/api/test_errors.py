"""TC-ERR-001: one shape of error everywhere, and nothing internal in it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.core.envelope import EnvelopeError
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.entry.asgi_types import Message
from multiverse_gateway.web.error_middleware import Errors
from support.gateways import stage


def error_of(response: Any) -> dict[str, Any]:
    """Return the error of an answer, having looked at its shape."""
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/admin/nothing", "/v1", "/admin", "/%00", "/%ff%fe", "/<script>"])
async def test_an_unknown_path_is_told_as_json(path: str) -> None:
    async with stage() as at:
        response = await at.client.get(path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/v1/models/a/b", {"GET", "HEAD"}),
        ("GET", "/admin/register", {"POST"}),
        ("GET", "/admin/register/x", {"PUT", "DELETE"}),
        ("POST", "/admin/servers", {"GET", "HEAD"}),
        ("PUT", "/admin/import", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ],
)
async def test_a_wrong_method_names_the_right_ones(method: str, path: str, allowed: set[str]) -> None:
    async with stage() as at:
        response = await at.client.request(method, path)
        assert response.status_code == 405
        assert error_of(response)["code"] == "method_not_allowed"
        assert set(response.headers["allow"].split(", ")) == allowed


async def broken(request: Request) -> Response:
    raise RuntimeError("secret: sk-hidden")


async def no_storage(request: Request) -> Response:
    raise StorageUnavailable("The registry cannot be written now; try again in a moment", retry_after=2)


async def unreadable(request: Request) -> Response:
    raise EnvelopeError("The body names no model", "model")


EXTRA = [Route("/broken", broken), Route("/full", no_storage), Route("/unreadable", unreadable)]


async def test_a_mistake_of_ours_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """FR-ERROR-003/004: the client learns the request's id, the log has the traceback under the same id."""
    async with stage(extra=[*EXTRA]) as at:
        with caplog.at_level(logging.ERROR, logger="multiverse_gateway.api"):
            response = await at.client.get("/broken", headers={"x-request-id": "r-1"})
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    (record,) = caplog.records
    assert vars(record)["fields"]["request_id"] == "r-1"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)


async def test_known_errors_keep_their_status_and_headers() -> None:
    async with stage(extra=[*EXTRA]) as at:
        full = await at.client.get("/full")
        assert (full.status_code, full.headers["retry-after"], error_of(full)["code"]) == (503, "2", "storage_unavailable")
        unread = await at.client.get("/unreadable")
        assert (unread.status_code, error_of(unread)["param"]) == (400, "model")


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_an_error_in_mid_answer_ends_the_body(version: str) -> None:
    """HTTP/1.1 breaks off, so that nobody takes the rest for all; HTTP/2 ends, since its stream would stay open for ever."""
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "http_version": version, "headers": []}
    if version == "2":
        await Errors(app)(scope, receive, send)
        assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    else:
        with pytest.raises(RuntimeError):
            await Errors(app)(scope, receive, send)
        assert len(sent) == 2
