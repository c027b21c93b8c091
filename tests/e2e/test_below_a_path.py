"""36: a gateway that a proxy serves below a path, whether the proxy leaves the path in requests or takes it off; behind a real nginx."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import httpx2
import pytest

from support.backends import Backend
from support.nginx import location, nginx
from support.processes import DOORS, Door, GatewayProcess, door_setting
from support.raw_client import RawClient
from support.sockets import serving

pytestmark = pytest.mark.e2e

ROOT = "/ai/gateway"
PAGES = ("/dashboard", "/register", "/models", "/playground", "/keys", "/logs", "/settings", "/docs")


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Return a server that answers well."""
    with serving(server := Backend("tiny", models=["tiny"])):
        yield server


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest, backend: Backend) -> Iterator[GatewayProcess]:
    """Return a gateway that knows its path, by each door; one is told with the prefix of the settings, the other without it."""
    door: Door = request.param
    name = "ROOT_PATH" if door == "direct" else "MULTIVERSE_ROOT_PATH"
    with GatewayProcess({name: f"{ROOT}/", **door_setting(door)}) as process:
        process.register("tiny", backend.url)
        yield process


@pytest.fixture(scope="module", params=[True, False], ids=["stripped", "left"])
def proxied(request: pytest.FixtureRequest, gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of the gateway behind nginx, which takes the path off or leaves it."""
    directory: Path = tmp_path_factory.mktemp("nginx")
    with nginx(directory, location(ROOT, gateway.url, strips=request.param)) as url:
        yield url + ROOT


@pytest.fixture
def client(proxied: str) -> Iterator[httpx2.Client]:
    """Return a client of nginx that asks for pages and keeps cookies."""
    with httpx2.Client(base_url=proxied, headers={"accept": "text/html"}, trust_env=False, timeout=30.0) as made:
        yield made


def chat(**fields: object) -> dict[str, object]:
    """Return the body of a request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **fields}


def sign_in(client: httpx2.Client, gateway: GatewayProcess) -> httpx2.Response:
    """Sign in by the form, after being sent to it."""
    asked = client.get("/logs?level=ERROR")
    assert asked.status_code == 303
    form = client.get(httpx2.URL(str(client.base_url)).join(asked.headers["location"]))
    token = re.search(r'name="form_token" value="([^"]*)"', form.text)
    wanted = re.search(r'name="next" value="([^"]*)"', form.text)
    action = re.search(r'action="([^"]*login[^"]*)"', form.text)
    assert token
    assert wanted
    assert action
    origin = re.match(r"http://[^/]+", str(client.base_url))
    assert origin
    data = {"form_token": token[1], "key": gateway.admin_key, "next": unescape(wanted[1])}
    return client.post(origin[0] + action[1], data=data, headers={"origin": origin[0]})


def test_every_call_of_the_api_is_served(client: httpx2.Client, backend: Backend) -> None:
    """Plain and streamed, by either spelling of the base URL; the server sees the usual path."""
    for path in ("/v1/chat/completions", "/chat/completions"):
        for stream in (False, True):
            hits = backend.hits
            answer = client.post(path, json=chat(stream=stream))
            assert answer.status_code == 200, answer.text
            assert (backend.hits, backend.last.path) == (hits + 1, "/v1/chat/completions")
            assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert client.get("/health").status_code == 200


def test_the_rules_hold_below_the_path(client: httpx2.Client, gateway: GatewayProcess) -> None:
    """The admin API needs its key, forms of other sites are refused, and no spelling goes past either."""
    assert client.get("/admin/servers").status_code == 403
    assert client.get("/admin/servers", headers={"x-api-key": gateway.admin_key}).status_code == 200
    for path in ("//admin/servers", "/./admin/servers", "/v1/../admin/servers", f"{ROOT}/admin/servers", "/%61dmin/servers"):
        assert client.get(path).status_code in (400, 403, 404), path
    form = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain", "origin": "http://evil.example"})
    assert form.status_code == 403


def test_every_page_links_below_the_path(client: httpx2.Client, gateway: GatewayProcess) -> None:
    """From signing in to signing out: links, forms, styles, scripts and redirects."""
    arrived = sign_in(client, gateway)
    assert (arrived.status_code, arrived.headers["location"]) == (303, f"{ROOT}/logs?level=ERROR")
    assert client.get("").status_code in (301, 303)
    assert client.get("/").headers["location"] == f"{ROOT}/dashboard"
    found: set[str] = set()
    for page in PAGES:
        answer = client.get(page)
        assert answer.status_code == 200, page
        found |= set(re.findall(r'(?:href|src|action|hx-get|hx-post|data-post|data-poll)="([^"]+)"', answer.text))
        assert f'<meta name="live-url" content="{ROOT}/live">' in answer.text
    local = {unescape(link) for link in found if not link.startswith(("#", "http", "?", "data:"))}
    assert {f"{ROOT}/dashboard", f"{ROOT}/v1/chat/completions", f"{ROOT}/openapi.json"} <= local
    assert all(link.startswith(f"{ROOT}/") for link in local), sorted(local)
    for link in sorted(link for link in local if "/static/" in link):
        assert client.get(link.removeprefix(ROOT)).status_code == 200, link
    assert client.get("/openapi.json").json()["servers"][0]["url"] == ROOT
    with client.stream("GET", "/live?of=dashboard", headers={"accept": "text/event-stream"}) as live:
        assert live.headers["content-type"].startswith("text/event-stream")
    lost = client.get("/nothing-here")
    assert lost.status_code == 404
    assert f'href="{ROOT}/dashboard"' in lost.text


def test_the_gateway_itself_serves_both(gateway: GatewayProcess, backend: Backend) -> None:
    """With and without the path, also the path alone; a path that only begins alike is another one."""
    for root in ("", ROOT):
        assert gateway.call("POST", f"{root}/v1/chat/completions", chat()).status_code == 200
        assert gateway.call("GET", f"{root}/livez").status_code == 200
        assert gateway.call("GET", f"{root}/login").status_code == 200
    assert gateway.call("GET", ROOT).headers["location"] == f"{ROOT}/dashboard"
    for path in (f"{ROOT}x/livez", f"{ROOT}/{ROOT}/livez", "/ai/livez", f"{ROOT}{ROOT}/admin/servers"):
        assert gateway.call("GET", path).status_code == 404, path
    hits = backend.hits
    with RawClient(gateway.port) as raw:
        assert raw.fetch("POST", f"http://any.example{ROOT}/v1/chat/completions", json=chat()).status == 200
    assert backend.hits == hits + 1


def test_programs_find_the_way(client: httpx2.Client) -> None:
    """28: what a refusal names is where it can be reached."""
    refused = client.get("/settings", headers={"accept": "*/*"})
    assert refused.status_code == 401
    assert f" {ROOT}/login " in refused.text
