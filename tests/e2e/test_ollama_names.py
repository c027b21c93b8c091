"""A model that Ollama has under two names, with and without `:latest`, is one model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from support import behaviours
from support.backends import Backend
from support.processes import DOORS, GatewayProcess, door_setting
from support.sockets import serving

pytestmark = pytest.mark.e2e

SHORT, LONG = "llama3.2", "llama3.2:latest"


@pytest.fixture(scope="module")
def backends() -> Iterator[tuple[Backend, Backend]]:
    """Return two servers, as Ollama lists its models: with the tag."""
    with serving(one := Backend("one", behaviours.good(), models=(LONG,)), two := Backend("two", behaviours.good(), models=(LONG,))):
        yield one, two


@pytest.fixture(scope="module", params=DOORS)
def gateway(request: pytest.FixtureRequest, backends: tuple[Backend, Backend]) -> Iterator[GatewayProcess]:
    """Return a gateway where one owner registered the short name, and another one the long one."""
    with GatewayProcess({"RATE_LIMIT_PER_MINUTE": "0", **door_setting(request.param)}) as process:
        for name, backend in zip((SHORT, LONG), backends, strict=True):
            process.register(name, backend.url)
        process.register("tagged:3b", backends[0].url)
        yield process


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[httpx2.Client]:
    """Return a client of the gateway."""
    with httpx2.Client(base_url=gateway.url, timeout=20.0, trust_env=False) as made:
        yield made


def test_the_list_has_one_entry(client: httpx2.Client) -> None:
    """And both names lead to it."""
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [SHORT, "tagged:3b"]
    assert listed[0]["total_servers"] == 2
    assert client.get(f"/v1/models/{SHORT}").json() == client.get(f"/v1/models/{LONG}").json() == listed[0]
    assert client.get("/v1/models/tagged").status_code == 404


@pytest.mark.parametrize("name", [SHORT, LONG])
@pytest.mark.parametrize("stream", [False, True])
def test_each_server_gets_the_name_that_it_was_registered_with(
    client: httpx2.Client, backends: tuple[Backend, Backend], name: str, stream: bool
) -> None:
    """Nothing else of the body changes; both servers take their share."""
    for backend in backends:
        backend.forget()
    messages = [{"role": "user", "content": f'"model": "{name}"'}]
    sent = json.dumps(
        {"messages": messages, "model": name, "metadata": {"model": name}, "stream": stream, "stream_options": None}, indent=1
    )
    for _ in range(4):
        answer = client.post("/v1/chat/completions", content=sent, headers={"content-type": "application/json"})
        assert answer.status_code == 200
    for registered, backend in zip((SHORT, LONG), backends, strict=True):
        assert backend.hits >= 1
        assert backend.last.body.decode() == sent.replace(f'"model": "{name}",\n "metadata"', f'"model": "{registered}",\n "metadata"')


def test_a_form_gets_the_registered_name_too(client: httpx2.Client, backends: tuple[Backend, Backend]) -> None:
    """Transcriptions carry their model in a form."""
    for backend in backends:
        backend.forget()
        backend.behave = behaviours.answer(200, b'{"text":"x"}')
    for _ in range(4):
        files = {"file": ("a.wav", b"RIFF\r\n" * 20, "audio/wav")}
        assert client.post("/v1/audio/transcriptions", data={"model": LONG}, files=files).status_code == 200
    for registered, backend in zip((SHORT, LONG), backends, strict=True):
        assert f'name="model"\r\n\r\n{registered}\r\n'.encode() in backend.last.body
        backend.behave = behaviours.good()


@pytest.mark.parametrize("allowed", [SHORT, LONG])
def test_a_key_for_one_name_is_for_both(gateway: GatewayProcess, client: httpx2.Client, allowed: str) -> None:
    """In requests and in the list; a key for another model stays for that."""
    key = gateway.admin("POST", "/keys", {"name": f"for {allowed.replace(':', ' ')}", "models": [allowed]}).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    for name, status in ((SHORT, 200), (LONG, 200), ("tagged:3b", 403)):
        body: dict[str, Any] = {"model": name, "messages": []}
        assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == status
    assert [model["id"] for model in client.get("/v1/models", headers=headers).json()["data"]] == [SHORT]
    assert client.get(f"/v1/models/{LONG}", headers=headers).status_code == 200


def test_no_server_is_warned_of(gateway: GatewayProcess) -> None:
    """Ollama lists the long name only; the short one is not missing."""
    records = {record["model_name"]: record for record in gateway.admin("GET", "/servers").json()}
    assert records[SHORT]["warning"] is None
    assert records[LONG]["warning"] is None
    assert records["tagged:3b"]["warning"] is not None
    assert {record["model_name"] for record in gateway.admin("GET", f"/servers?model_name={LONG}").json()} == {SHORT, LONG}


def test_one_server_is_registered_once(gateway: GatewayProcess, backends: tuple[Backend, Backend]) -> None:
    """Registering the same server by its other name is the same registration, under the name that was sent last."""
    before = len(gateway.admin("GET", "/servers").json())
    answer = gateway.admin("POST", "/register", {"model_name": LONG, "endpoint_url": backends[0].url})
    assert (answer.status_code, answer.json()["model_name"]) == (200, LONG)
    assert gateway.admin("POST", "/register", {"model_name": SHORT, "endpoint_url": backends[0].url}).status_code == 200
    assert len(gateway.admin("GET", "/servers").json()) == before


def test_use_is_counted_for_one_model(gateway: GatewayProcess, client: httpx2.Client, backends: tuple[Backend, Backend]) -> None:
    """Metrics and usage counts have the name that the list has."""
    gateway.register("alone:latest", backends[0].url)
    for name in (SHORT, LONG, "alone", "alone:latest"):
        assert client.post("/v1/chat/completions", json={"model": name, "messages": []}).status_code == 200
    figures = client.get("/metrics").text
    for name, is_listed in ((SHORT, True), (LONG, False), ("alone:latest", True), ("alone", False)):
        assert (f'"{name}"' in figures) is is_listed
    for name in ("alone", "alone:latest"):
        (row,) = gateway.admin("GET", f"/usage?by=model&model={name}").json()["rows"]
        assert (row["model"], row["requests"]) == ("alone:latest", 2)


def test_the_pages_have_one_entry(gateway: GatewayProcess, client: httpx2.Client) -> None:
    """The page of models, found by either name, and the playground."""
    headers = {"x-api-key": gateway.admin_key, "accept": "text/html"}
    for query in ("", f"?q={SHORT}"):
        page = client.get(f"/models{query}", headers=headers)
        assert page.status_code == 200
        assert page.text.count(f">{SHORT}<") >= 1
    assert f'aria-expanded="false" value="{SHORT}"' in client.get(f"/playground?model={LONG}", headers=headers).text
