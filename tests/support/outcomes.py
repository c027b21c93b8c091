"""What the gateway makes of troubled servers and bad input, as facts without a word of its sentences."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
from click.testing import CliRunner

from multiverse_gateway import Settings
from multiverse_gateway.cli import main
from multiverse_gateway.cli.serving import Serving, serve
from multiverse_gateway.core.health import Health, HealthPolicy, Refused, advance, is_refused
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.pages.rendering import NEXT_PIECE
from multiverse_gateway.settings import SettingsError, load_settings
from multiverse_gateway.stores.rows import health_row, healths_of
from support.gateways import ADMIN_KEY
from support.pages import Browser, browsing
from support.troubles import NETWORKS, resolve, troubled

Facts = dict[str, Any]

FORM = {"model_name": "tiny", "endpoint_url": "http://gpu.example:8000", "weight": "1"}
BAD_FIELDS = {
    "model_name": "two words",
    "weight": "0",
    "max_tokens": "-1",
    "api_key": "two words",
    "endpoint_url": "http://169.254.169.254",
    "max_concurrency": "many",
}


async def _of_server(browser: Browser, name: str, url: str) -> Facts:
    """Return what each part of the gateway finds out about one server."""
    gateway = browser.parts.gateway
    server = Server(
        id=ServerId(f"00000000-0000-4000-8000-{len(name):012}"),
        model_name=name,
        endpoint_url=url,
        registered_at=1.0,
        created_at=1.0,
        updated_at=1.0,
    )
    result = await gateway.checks.check(server)
    body = {"model_name": name, "endpoint_url": url}
    tested = await browser.client.post("/admin/test-connection", json=body, headers={"x-api-key": ADMIN_KEY})
    page = await browser.send("/register/test", {"endpoint_url": url}, hx_request="true")
    registered = await browser.client.post("/admin/register", json=body, headers={"x-api-key": ADMIN_KEY})
    await gateway.store.save_server(server) if registered.is_error else None
    await gateway.refresh()
    route = next(route for route in gateway.table.routes.values() if route.server.model_name == name)
    await gateway.checks.check_now(route.server, forced=True)
    asked = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
    answers = [await browser.client.post("/v1/chat/completions", json={**asked, "stream": stream}) for stream in (False, True)]
    return {
        "probe": [result.passed, result.failed_step, result.unauthorized, result.timed_out],
        "test": [tested.status_code, [[step["step"], step["ok"]] for step in tested.json().get("steps", [])]],
        "page": re.findall(r'<li class="(\w+)">', page.text.rpartition(NEXT_PIECE)[2]),
        "registered": [registered.status_code, *_error(registered.json())],
        "state": gateway.table.routes[route.server.id].health.state,
        "answers": [[answer.status_code, *_error(answer.text)] for answer in answers],
    }


def _error(answer: Any) -> list[Any]:
    error = re.search(r'"code": ?("\w+"|null)', answer) if isinstance(answer, str) else answer.get("error")
    if isinstance(error, re.Match):
        return [error[1]]
    return [error["code"], error["param"]] if error else []


async def _of_forms(browser: Browser) -> Facts:
    """Return at which field of the form each bad value is shown."""
    found = {}
    for name, value in BAD_FIELDS.items():
        note = await browser.send(f"/register/field?name={name}", {name: value}, hx_request="true")
        sent = await browser.send("/register", {**FORM, name: value}, hx_request="true")
        marks = re.findall(r'data-state="(\w*)" data-field="(\w+)"', note.text + sent.text)
        found[name] = [note.status_code, sent.status_code, marks]
    return found


def _of_the_command(urls: Mapping[str, str]) -> Facts:
    """Return the exit code of the command `check`, and how each step went."""
    found = {}
    for name in ("well", "wants-a-key", "moved", "elsewhere", "loading", "page", "huge", "hangs-up", "closed", "no-tls"):
        result = CliRunner().invoke(main, ["check", urls[name], "--allow-private", "--json"])
        steps = json.loads(result.stdout)["steps"]
        found[name] = [result.exit_code, [[step["passed"], step["remedy"] is not None] for step in steps]]
    return found


async def _of_servers() -> Facts:
    found: Facts = {}
    async with troubled() as urls:
        for name, url in urls.items():
            async with browsing(probes=True, resolve=resolve, allow_private_networks=NETWORKS) as browser:
                await browser.sign_in()
                found[name] = await _of_server(browser, name, url)
                if name == "well":
                    found["forms"] = await _of_forms(browser)
        found["command"] = await anyio.to_thread.run_sync(_of_the_command, urls)
    return found


def _of_a_refusal() -> Any:
    """Return the API path on which a server refuses the gateway, as another process reads it from the store."""
    health = advance(Health(), Refused(1, "no", "/v1/embeddings"), HealthPolicy(), now=1.0, wall=1.0, random=0.5)
    ((_, read),) = healths_of([health_row(ServerId("x"), health)])
    return is_refused(read)


def _of_settings() -> Any:
    try:
        load_settings(env={"PORT": "70000"}, cwd=Path("/"))
    except SettingsError as error:
        return [getattr(error, "field", None), str(error).startswith("PORT=70000")]
    return None


def _of_a_start() -> Any:
    """Return how a gateway ends whose database is no database."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as sock:
        path = Path(folder, "broken.db")
        path.write_bytes(b"no database at all" * 100)
        sock.bind(("127.0.0.1", 0))
        written = CliRunner()
        with written.isolation() as (_, errors, _):
            code = serve(Serving(Settings(database_url=f"sqlite:///{path}"), sock))
            shown = errors.getvalue().decode()
        return [code, str(path) in shown, "Traceback" in shown]


def print_all() -> None:
    """Print all outcomes as JSON."""
    os.chdir(tempfile.gettempdir())
    found = {"refusal": _of_a_refusal(), "settings": _of_settings(), "start": _of_a_start(), **anyio.run(_of_servers)}
    print(json.dumps(found, default=attrs.asdict))
