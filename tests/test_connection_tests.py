"""One connection test: its steps at servers that fail in many ways, and the three places that show them."""

from __future__ import annotations

import json
import re
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import attrs
import httpx2
import pytest
from click.testing import CliRunner

from multiverse_gateway import ProbeResult, Server, ServerId, Settings, plugins
from multiverse_gateway.cli import main
from multiverse_gateway.cli.check import NAMES
from multiverse_gateway.connection_test import Means, Outcome, StepResult, examine, means_of, scout
from multiverse_gateway.core.addresses import AddressPolicy, AddressRefusal, parse_endpoint
from multiverse_gateway.core.failover import ConnectFailure
from multiverse_gateway.dialing import client_over, wire_of
from multiverse_gateway.pages import connection_steps
from multiverse_gateway.pages.rendering import NEXT_PIECE
from multiverse_gateway.probes.models import ModelsProbe
from multiverse_gateway.protocols import Client, ProbeProblem, ProbeStep
from multiverse_gateway.relay.transport import WireTransport
from support import behaviours
from support.backends import Backend, Behaviour, Exchange, list_models
from support.gateways import ADMIN_KEY
from support.pages import browsing
from support.troubles import ANSWERS, NETWORKS, STEPS, resolve, troubled

PROBED = [ProbeStep.URL, ProbeStep.NAME, ProbeStep.ADDRESS, ProbeStep.CONNECTION, ProbeStep.ACCESS, ProbeStep.ANSWER]
UNUSED = "http://gpu.example:8000"
TITLES = ["DNS lookup", "Address allowed", "Connection", "Authentication", "Model list", "Test reply"]


def server_at(url: str, model: str = "tiny") -> Server:
    return Server(id=ServerId("one"), model_name=model, endpoint_url=url, registered_at=1.0, created_at=1.0, updated_at=1.0)


async def results(server: Server, named: str | None, means: Means) -> list[StepResult]:
    return [found async for found in examine(server, named, means)]


def taken(found: list[StepResult]) -> list[tuple[ProbeStep, Outcome]]:
    return [(step.step, step.outcome) for step in found]


@pytest.mark.e2e
async def test_the_steps_end_at_the_first_one_that_fails() -> None:
    """With a gateway's own probe, over its own wire."""
    settings = Settings(allow_private_networks=NETWORKS)
    wire = wire_of(settings, policy=lambda: AddressPolicy.parse(NETWORKS), resolve=resolve)
    async with troubled() as urls, client_over(WireTransport(wire)) as http:
        means = Means(check=lambda server: ModelsProbe().check(server, http), http=http, chat=plugins.chat_probe(settings))
        for name, step in STEPS.items():
            found = await results(server_at(urls[name]), None, means)
            if name == "lists-but-refuses":  # the list is open, the chat is not
                assert taken(found)[-1] == (ProbeStep.CHAT, Outcome.FAILED)
                assert found[-1].problem is ProbeProblem.KEY_MISSING
            elif step is None:
                assert taken(found) == [(step, Outcome.PASSED) for step in [*PROBED, ProbeStep.MODEL, ProbeStep.CHAT]]
            else:
                assert [step for step, outcome in taken(found) if outcome is Outcome.PASSED][:-1] == PROBED[: len(found) - 2], name
                assert taken(found)[-1] == (step, Outcome.FAILED), name
    await wire.aclose()


@pytest.mark.e2e
async def test_a_scout_takes_the_way_step_by_step() -> None:
    """What a setting could open is dialed all the same; what stays closed whatever is set is not."""
    wire = wire_of(Settings(), policy=lambda: AddressPolicy(allow_private=True), resolve=resolve)
    async with troubled() as urls:

        async def scouted(url: str) -> list[StepResult]:
            return [found async for found in scout(wire, parse_endpoint(url), AddressPolicy(), time.monotonic)]

        (lost,) = await scouted(urls["nowhere"])
        assert (lost.step, lost.cause) == (ProbeStep.NAME, ConnectFailure.RESOLVE)
        name, address = await scouted(urls["metadata"])
        assert (name.addresses, address.refusal, address.is_final) == (("169.254.169.254",), AddressRefusal.METADATA, True)
        name, address, connection = await scouted(urls["well"])
        assert (name.addresses, address.refusal, address.is_final) == (("127.0.0.1",), AddressRefusal.LOOPBACK, False)
        assert (connection.outcome, connection.address) == (Outcome.PASSED, "127.0.0.1")
        assert (await scouted(urls["closed"]))[-1].cause is ConnectFailure.REFUSED
        assert (await scouted(urls["no-tls"]))[-1].cause is ConnectFailure.NO_TLS
    assert not wire.connections
    await wire.aclose()


async def test_what_the_server_offers_decides_about_the_model() -> None:
    """The one that is wanted is tried in any case, the first of the list if none is; nothing is tried if nobody names any."""

    def means(*names: str) -> Means:
        async def check(server: Server) -> ProbeResult:
            return ProbeResult(server_id=server.id, generation=1, passed=True, checked_at=1.0, duration=0.1, models=names)

        return Means(check=check, http=httpx2.AsyncClient())

    for names, named, outcome, model in [
        (("tiny", "other"), None, Outcome.PASSED, "tiny"),
        (("tiny",), "tiny:latest", Outcome.PASSED, "tiny:latest"),
        (("tiny",), "another", Outcome.DOUBTFUL, "another"),
        ((), "another", Outcome.DOUBTFUL, "another"),
        ((), None, Outcome.DOUBTFUL, None),
    ]:
        last = (await results(server_at("http://gpu.example"), named, means(*names)))[-1]
        assert (last.step, last.outcome, last.model) == (ProbeStep.MODEL, outcome, model)


@attrs.frozen
class Chat:
    """A probe that hangs, raises, or returns what it was given."""

    result: ProbeResult | None = None
    hangs: bool = False

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Do it."""
        if self.hangs:
            await anyio.sleep_forever()
        if self.result is None:
            raise RuntimeError("broken")
        return self.result


@pytest.mark.parametrize(("chat", "problem"), [(Chat(hangs=True), ProbeProblem.TIMEOUT), (Chat(), ProbeProblem.BROKEN)])
async def test_a_chat_that_hangs_or_breaks_is_a_failed_step(chat: Chat, problem: ProbeProblem) -> None:
    """Whatever the probe does, the test ends, with a category."""
    listed = ProbeResult(server_id=ServerId("one"), generation=1, passed=True, checked_at=1.0, duration=0.1, models=("tiny",))

    async def check(server: Server) -> ProbeResult:
        return listed

    means = Means(check=check, http=httpx2.AsyncClient(), chat=chat, chat_seconds=0.01)
    last = (await results(server_at("http://gpu.example"), None, means))[-1]
    assert (last.step, last.outcome, last.problem, last.result) == (ProbeStep.CHAT, Outcome.FAILED, problem, None)


@pytest.mark.parametrize("step", [ProbeStep.MODEL, ProbeStep.CHAT])
async def test_a_probe_may_fail_at_a_later_step(step: ProbeStep) -> None:
    """A probe of somebody else's that asks for more ends the test there; a step that it does not name is its answer."""
    failed = ProbeResult(server_id=ServerId("one"), generation=1, passed=False, checked_at=1.0, duration=0.1, failed_at=step)

    async def check(server: Server) -> ProbeResult:
        return failed

    means = Means(check=check, http=httpx2.AsyncClient(), chat=Chat(failed))
    assert taken(await results(server_at("http://gpu.example"), None, means)) == [
        *[(before, Outcome.PASSED) for before in PROBED],
        (step, Outcome.FAILED),
    ]
    assert attrs.evolve(failed, failed_at=None).failed_step is ProbeStep.ANSWER


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["nowhere", "private", "closed", "no-tls", "offline-tunnel", "wants-a-key", "page", "well"])
async def test_api_page_and_command_find_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own words and with its own division into steps."""
    monkeypatch.chdir(tmp_path)
    step = STEPS[name]
    async with troubled() as urls, browsing(probes=True, resolve=resolve, allow_private_networks=NETWORKS) as browser:
        await browser.sign_in()
        answer = await browser.client.post("/admin/test-connection", json={"endpoint_url": urls[name]}, headers={"x-api-key": ADMIN_KEY})
        page = await browser.send("/register/test", {"endpoint_url": urls[name]}, hx_request="true")
        command = partial(CliRunner().invoke, main, ["check", urls[name], "--allow-private", "--json"])
        result = await anyio.to_thread.run_sync(command) if name not in ("nowhere", "private") else None
    failed = re.findall(r'<li class="bad">.*<strong>(.*)</strong>', page.text.rpartition(NEXT_PIECE)[2])
    tested = answer.json()
    if step is None:
        assert (tested["ok"], failed) == (True, [])
    else:
        assert not tested["ok"]
        assert failed == [TITLES[PROBED.index(step) - 1]]
        groups = {ProbeStep.NAME: "address", ProbeStep.ADDRESS: "address", ProbeStep.ACCESS: "key"}
        assert (tested["steps"][-1]["step"], tested["steps"][-1]["ok"]) == (groups.get(step, "answer"), False)
    if result is not None:
        last = json.loads(result.stdout)["steps"][-1]
        assert (result.exit_code, last["passed"]) == ((0, True) if step is None else (1, False))
        at_once = step is ProbeStep.CONNECTION and name in ANSWERS  # the tunnel's connection works; its answer says that it is idle
        assert last["name"] == NAMES[ProbeStep.CHAT if step is None else ProbeStep.ANSWER if at_once else step]


async def test_a_gateways_test_uses_its_own_probe_and_client() -> None:
    """The probe that decides whether the server may be registered."""
    async with browsing() as browser:
        gateway = browser.parts.gateway
        assert means_of(gateway, server_at(UNUSED), chats=False).chat is None
        means = means_of(gateway, server_at(UNUSED), chats=True)
        assert (means.check, means.http) == (gateway.checks.check, gateway.network.http)


def loading_for(times: int) -> Behaviour:
    """Answer so many requests for the list of models with 503, and then list the model."""
    left = [times]

    async def answer(exchange: Exchange) -> None:
        left[0] -= 1
        await (behaviours.status(503) if left[0] >= 0 else list_models)(exchange)

    return answer


@pytest.mark.e2e
async def test_a_silent_port_is_told_from_a_closed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is open, but nothing comes back in TLS: the page offers the address with http as a button, the command names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MULTIVERSE_CONNECT_TIMEOUT_SECONDS", "1.2")
    silent = socket.create_server(("127.0.0.1", 0))  # the system accepts connections, and nothing reads them
    url = f"https://127.0.0.1:{silent.getsockname()[1]}"
    async with browsing(probes=True, allow_private_networks=NETWORKS, connect_timeout_seconds=1.2) as browser:
        await browser.sign_in()
        page = await browser.send("/register/test", {"endpoint_url": url}, hx_request="true")
        answer = await browser.client.post("/admin/test-connection", json={"endpoint_url": url}, headers={"x-api-key": ADMIN_KEY})
        result = await anyio.to_thread.run_sync(partial(CliRunner().invoke, main, ["check", url, "--allow-private"]))
    silent.close()
    http = url.replace("https", "http")
    assert f'data-fill="endpoint_url" data-value="{http}"' in page.text
    assert "open but gives no answer in TLS: try http://" in answer.json()["reason"]
    assert "the port is open but gives no answer in TLS" in result.output


@pytest.mark.e2e
async def test_the_page_waits_for_a_server_that_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, tests again, and ends with the models; without waiting it offers to wait."""
    monkeypatch.setattr(connection_steps, "WAIT_EVERY", 0.01)
    async with Backend("slow", models=["tiny"]) as slow, browsing(probes=True, allow_private_networks=NETWORKS) as browser:
        await browser.sign_in()
        slow.behave_models = behaviours.status(503)
        once = await browser.send("/register/test", {"endpoint_url": slow.url}, hx_request="true")
        assert "Wait for it" in once.text
        assert once.text.count("(status 503)") == 1
        slow.behave_models = loading_for(3)
        waited = await browser.send("/register/test", {"endpoint_url": slow.url, "wait": "1"}, hx_request="true")
        assert waited.text.count("The server is still loading. The next test is in") == 3
        last = waited.text.rpartition(NEXT_PIECE)[2]
        assert "All checks passed." in last
        assert "Wait for it" not in last


@pytest.mark.e2e
async def test_a_server_that_asks_for_a_key_leads_to_its_field() -> None:
    """The page unfolds and focuses it."""
    async with troubled() as urls, browsing(probes=True, resolve=resolve, allow_private_networks=NETWORKS) as browser:
        await browser.sign_in()
        page = await browser.send("/register/test", {"endpoint_url": urls["wants-a-key"]}, hx_request="true")
        assert 'data-unfold="api_key"' in page.text


@pytest.mark.e2e
async def test_the_api_tries_a_model_that_is_not_listed_as_registering_does() -> None:
    """A listed one, and a test without a model, cost no token."""
    async with Backend("tiny", models=["tiny"]) as tiny, browsing(probes=True, allow_private_networks=NETWORKS) as browser:

        async def tested(**body: str) -> dict[str, Any]:
            answer = await browser.client.post(
                "/admin/test-connection", json={"endpoint_url": tiny.url, **body}, headers={"x-api-key": ADMIN_KEY}
            )
            found: dict[str, Any] = answer.json()
            return found

        assert [(await tested())["ok"], (await tested(model_name="tiny"))["ok"], tiny.trials] == [True, True, []]
        assert (await tested())["warning"] is None
        alias = await tested(model_name="alias")
        assert (alias["ok"], alias["steps"][-1]) == (True, {"step": "chat", "ok": True, "message": "The model answers"})
        tiny.behave_trial = behaviours.status(404, message="model 'tinny' not found")
        wrong = await tested(model_name="tinny")
        assert (wrong["ok"], wrong["steps"][-1]["step"], wrong["steps"][-1]["ok"]) == (False, "chat", False)
        assert wrong["reason"].endswith("Did you mean tiny?")
