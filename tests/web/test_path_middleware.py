"""The middleware that gives API paths their one spelling, and the paths of an API that the gateway does not have."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from multiverse_gateway.entry.asgi_types import Message, Receive, Scope, Send
from multiverse_gateway.entry.headers import path_of
from multiverse_gateway.web.error_middleware import EXCEPTION_HANDLERS
from multiverse_gateway.web.path_middleware import Paths, ollama_routes


async def seen(scope: Scope, *, root: str = "") -> Scope:
    """Return the scope that an application gets behind the middleware."""
    scopes: list[Scope] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    await Paths(application, root=root)(scope, receive, send)
    (found,) = scopes
    return found


def scope_of(method: str, path: str, *headers: tuple[bytes, bytes], mount: str = "") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": mount + path, "raw_path": b"?", "root_path": mount, "headers": list(headers)}


@pytest.mark.parametrize("mount", ["", "/llm"])
@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("//v1//chat/completions/", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("//admin/register", "//admin/register"),
        ("/login", "/login"),
    ],
)
async def test_a_path_is_respelled_below_its_mount(mount: str, path: str, found: str) -> None:
    """An application that is mounted in another one keeps its prefix."""
    scope = await seen(scope_of("POST", path, mount=mount))
    assert (scope["path"], path_of(scope)) == (mount + found, found)
    assert scope["raw_path"] in (b"?", (mount + found).encode())


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ((), "/v1/models"),
        (((b"accept", b"*/*"),), "/v1/models"),
        (((b"accept", b"application/json"),), "/v1/models"),
        (((b"accept", b"text/html,*/*"),), "/models"),
        (((b"accept", b"text/event-stream"),), "/models"),
        (((b"accept", b"*/*"), (b"hx-request", b"true")), "/models"),
    ],
)
async def test_who_shows_pages_gets_the_page(headers: tuple[tuple[bytes, bytes], ...], found: str) -> None:
    """Browsers, htmx and streams of changes get the page of models; every other client the list."""
    assert path_of(await seen(scope_of("GET", "/models", *headers))) == found


async def test_other_scopes_pass_as_they_are() -> None:
    """A lifespan has no path."""
    scope = {"type": "lifespan"}
    assert await seen(scope) is scope


@pytest.mark.parametrize(
    ("host", "root"),
    [
        ("gpu.example:8000", "http://gpu.example:8000/v1"),
        ("[2001:db8::1]:8000", "http://[2001:db8::1]:8000/v1"),
        ("a/b", "http://localhost/v1"),
        ("<b>", "http://localhost/v1"),
    ],
)
@pytest.mark.parametrize("path", ["/api", "/api/tags", "/api/chat"])
async def test_a_client_of_ollama_learns_the_base_url(host: str, root: str, path: str) -> None:
    """By the name that it used itself, if that is one."""
    app = Starlette(routes=ollama_routes(()), exception_handlers=EXCEPTION_HANDLERS)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        answer = await client.request("POST", path, headers={"host": host}, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert f"base URL {root}." in answer.json()["error"]["message"]
