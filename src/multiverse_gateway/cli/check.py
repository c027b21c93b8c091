"""The command `check`: what a gateway would find at a server, one step after the other."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import attrs
import click

from multiverse_gateway import plugins
from multiverse_gateway.cli.common import json_option, print_json, printable, settings_here, trimmed
from multiverse_gateway.connection_test import Means, Outcome, StepResult, examine, scout
from multiverse_gateway.core.addresses import AddressPolicy, AddressRefusal, Endpoint, EndpointError, parse_root
from multiverse_gateway.core.failover import ConnectFailure
from multiverse_gateway.core.pasting import pasted
from multiverse_gateway.core.server_access import HOST_HEADER
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.dialing import client_over, wire_of
from multiverse_gateway.probes.models import ModelsProbe
from multiverse_gateway.protocols import ProbeProblem, ProbeResult, ProbeStep
from multiverse_gateway.relay.transport import WireTransport
from multiverse_gateway.settings import Settings

NAMES: Mapping[ProbeStep, str] = {
    ProbeStep.URL: "URL",
    ProbeStep.NAME: "name",
    ProbeStep.ADDRESS: "address",
    ProbeStep.CONNECTION: "connection",
    ProbeStep.ACCESS: "model list",
    ProbeStep.ANSWER: "model list",
    ProbeStep.MODEL: "models",
    ProbeStep.CHAT: "chat",
}
"""What the command calls each step; ACCESS shows in the answer to the request for the list of models."""


@attrs.frozen
class CheckedStep:
    """What one step found; `remedy` says how to mend it. A step with a remedy that passed is a warning."""

    name: str
    passed: bool
    finding: str
    remedy: str | None = None


@click.command("check")
@click.argument("url")
@click.option("--model", help="Name under which the server will be registered.")
@click.option("--api-key", envvar="BACKEND_API_KEY", help="The server's own key, if it needs one; prefer the variable BACKEND_API_KEY.")
@click.option("--allow-private", is_flag=True, help="Assume a gateway that may use private networks.")
@json_option
def check_command(url: str, model: str | None, api_key: str | None, allow_private: bool, as_json: bool) -> None:
    """Check step by step whether a gateway can use a model server.

    The exit code is 0 if it could, and 1 if not; the last step then says why.
    """
    settings = settings_here()
    policy = AddressPolicy.parse("true" if allow_private else settings.allow_private_networks)
    passed = anyio.run(_check, url, trimmed(model), trimmed(api_key), policy, settings, as_json)
    raise SystemExit(0 if passed else 1)


async def _check(url: str, model: str | None, api_key: str | None, policy: AddressPolicy, settings: Settings, as_json: bool) -> bool:
    """Take the steps, print each as soon as it is taken, or all as JSON at the end, and return whether all passed."""
    steps = []
    async for step in _steps(url, model, api_key, policy, settings):
        steps.append(step)
        if not as_json:
            _print_step(step)
    passed = all(step.passed for step in steps)
    if as_json:
        print_json({"url": url, "passed": passed, "steps": [attrs.asdict(step) for step in steps]})
    else:
        click.echo("\nA gateway can use this server." if passed else "\nA gateway cannot use this server yet.")
    return passed


def _print_step(step: CheckedStep) -> None:
    mark = "FAILED" if not step.passed else "note" if step.remedy else "ok"
    click.echo(f"{mark:>6}  {step.name}: {printable(step.finding)}")
    if step.remedy:
        click.echo(f"        -> {printable(step.remedy)}")


async def _steps(url: str, model: str | None, api_key: str | None, policy: AddressPolicy, settings: Settings) -> AsyncIterator[CheckedStep]:
    try:
        endpoint = parse_root(pasted(url))
    except EndpointError as error:
        yield CheckedStep("URL", False, str(error), "give the server's root, such as http://gpu.example:8000")
        return
    server = Server(
        id=ServerId("checked"),
        model_name=model or "unnamed",
        endpoint_url=endpoint.url,
        api_key=api_key,
        registered_at=0.0,
        created_at=0.0,
        updated_at=0.0,
    )
    wording = Wording(endpoint=endpoint, model=model, has_key=api_key is not None, settings=settings)
    async with _means(endpoint, policy, settings) as means:
        async for result in examine(server, model, means):
            step = wording.step(result)
            if step is not None:
                yield step


@asynccontextmanager
async def _means(endpoint: Endpoint, policy: AddressPolicy, settings: Settings) -> AsyncIterator[Means]:
    """Yield what a gateway with these settings would use; private addresses are always dialed, so that the rest can be checked."""
    opened = attrs.evolve(policy, allow_private=True)
    wire = wire_of(settings, policy=lambda: opened)
    seconds = settings.health_check_timeout_seconds

    async def check(server: Server) -> ProbeResult:
        began, wall = time.monotonic(), time.time()
        with anyio.move_on_after(seconds):
            return await ModelsProbe().check(server, http)
        duration = time.monotonic() - began
        facts = {"server_id": server.id, "generation": 1, "passed": False, "checked_at": wall, "duration": duration}
        return ProbeResult(**facts, timed_out=True, problem=ProbeProblem.TIMEOUT)  # type: ignore[arg-type]

    async with client_over(WireTransport(wire)) as http:
        try:
            yield Means(
                check=check,
                http=http,
                chat=plugins.chat_probe(settings),
                chat_seconds=settings.first_byte_timeout_seconds,
                scout=partial(scout, wire, endpoint, policy, time.monotonic),
            )
        finally:
            await wire.aclose()


_ABLE: Mapping[str, str] = {
    "/v1/embeddings": "makes embeddings",
    "/v1/rerank": "ranks documents",
    "/v1/completions": "completes text",
}
_KEY = "give its key with --api-key, here and when you register it"
_COMPATIBLE = "is this the root URL of an OpenAI-compatible server?"
_UNCOMPRESSED = "turn off compression in the server or in the proxy in front of it"
_PROBLEMS: Mapping[ProbeProblem, tuple[str, str]] = {
    ProbeProblem.KEY_MISSING: ("the server requires a key (status 401)", _KEY),
    ProbeProblem.KEY_REFUSED: ("the server rejects the key (status 401)", _KEY),
    ProbeProblem.UNSENDABLE_KEY: ("the key cannot be sent in a header", "give a key of one line, without invisible characters"),
    ProbeProblem.IDLE_TUNNEL: ("the tunnel answers, but nothing is behind it", "start the server, then the tunnel to its port"),
    ProbeProblem.REDIRECT: (
        "the server redirects (status {status})",
        "give the URL that it redirects to; a gateway does not follow redirects",
    ),
    ProbeProblem.NOT_FOUND: (
        "the path does not exist (status 404)",
        "give the root URL, without /v1; is it an OpenAI-compatible server?",
    ),
    ProbeProblem.UNKNOWN_MODEL: ("the server does not know the model", "give one of its models with --model"),
    ProbeProblem.BUSY: ("the server is loading or busy (status {status})", "wait a little and check again"),
    ProbeProblem.STATUS: ("status {status}", "look at the server's log"),
    ProbeProblem.NO_LIST: ("GET /v1/models answers 200, but not with an OpenAI list", _COMPATIBLE),
    ProbeProblem.NO_CHOICES: ("the answer has no choices", "is this an OpenAI-compatible chat model?"),
    ProbeProblem.COMPRESSED: ("the answer is compressed, although the gateway did not ask for that", _UNCOMPRESSED),
    ProbeProblem.TOO_LARGE: ("the answer is larger than 1 MiB", "is this the root URL of a model server?"),
    ProbeProblem.TIMEOUT: ("no answer within {seconds:g} seconds", "is the model still loading, or is the machine busy?"),
    ProbeProblem.BROKEN: ("the connection broke before the answer was complete", "is it https or http? Look at the server's log"),
}
_CAUSES: Mapping[ConnectFailure, tuple[str, str]] = {
    ConnectFailure.RESOLVE: ("{host} cannot be resolved", "check the spelling; a tunnel may have a new address"),
    ConnectFailure.TIMEOUT: ("no answer within {connect:g} seconds", "is the machine on? A firewall may drop incoming connections"),
    ConnectFailure.REFUSED: (
        "port {port} is closed",
        "start the server; if it runs, let it listen on this address (--host 0.0.0.0) and this port",
    ),
    ConnectFailure.TLS: ("no secure connection (TLS)", "is it https or http? Is the certificate valid for this name?"),
    ConnectFailure.NO_TLS: ("the port is open but does not speak TLS", "try http:// instead of https://"),
    ConnectFailure.TLS_TIMEOUT: ("the port is open but gives no answer in TLS", "try http:// instead of https://"),
    ConnectFailure.REFUSED_ADDRESS: ("the gateway may not connect to this address", "use a public address or a tunnel"),
    ConnectFailure.OTHER: ("no connection", "is the network up, and is the address right?"),
}


@attrs.frozen(kw_only=True)
class Wording:
    """How the command words the steps of one test."""

    endpoint: Endpoint
    model: str | None
    has_key: bool
    settings: Settings

    def step(self, result: StepResult) -> CheckedStep | None:
        """Return a step as the command shows it, or `None` if the next step includes it."""
        if result.step is ProbeStep.ACCESS and result.outcome is Outcome.PASSED:
            return None
        if result.outcome is Outcome.FAILED:
            is_probed = result.result is not None and result.step is not ProbeStep.CHAT
            return CheckedStep(NAMES[ProbeStep.ANSWER if is_probed else result.step], False, *self._failed(result))
        if result.step is ProbeStep.MODEL:
            return self._offer(result)
        if result.step is ProbeStep.CHAT:
            return self._chat(result)
        return CheckedStep(NAMES[result.step], True, self._passed(result))

    def _passed(self, result: StepResult) -> str:
        """Return what a step found that passed."""
        endpoint = self.endpoint
        match result.step:
            case ProbeStep.NAME:
                return f"{endpoint.host} is {', '.join(result.addresses)}"
            case ProbeStep.ADDRESS:
                return "a gateway may connect to it"
            case ProbeStep.CONNECTION:
                return f"{result.address} port {endpoint.port} in {1000 * result.seconds:.0f} ms"
            case ProbeStep.ANSWER if result.result is not None:
                return f"GET /v1/models answers with {len(result.result.models)} models"
        return endpoint.url

    def _offer(self, result: StepResult) -> CheckedStep:
        names = () if result.result is None else result.result.models
        name = NAMES[ProbeStep.MODEL]
        if result.model is None:
            return CheckedStep(name, False, "the list is empty", "load a model, or name the one to use with --model")
        if not names:
            return CheckedStep(name, True, f"the list is empty; {result.model} is tried all the same")
        if result.outcome is Outcome.DOUBTFUL:
            return CheckedStep(
                name,
                True,
                f"{result.model} is not in the list: {_some(names)}",
                "many servers accept any name; if this one does not, register one of these",
            )
        return CheckedStep(name, True, _some(names))

    def _chat(self, result: StepResult) -> CheckedStep:
        name = NAMES[ProbeStep.CHAT]
        if result.ability is not None:
            return CheckedStep(name, True, f"no chat: {result.model} {_ABLE[result.ability]}")
        if result.result is None or result.result.lacks_chat:
            return CheckedStep(name, True, "no chat", "if it should chat, load a chat model, or give the model a chat template")
        return CheckedStep(name, True, f"{result.model} made one token in {result.result.duration:.1f} s")

    def _failed(self, result: StepResult) -> tuple[str, str]:
        """Return what a step found that failed, and the remedy."""
        if result.refusal is not None:
            opens = (
                ", or open the network with MULTIVERSE_ALLOW_PRIVATE_NETWORKS (here: --allow-private)" if result.refusal.is_openable else ""
            )
            other = "use a public address or a tunnel"
            if result.refusal is AddressRefusal.LOOPBACK:
                other = (
                    "every computer calls itself so: use the address of the server's computer or a tunnel, or offer it on the page Register"
                )
            return f"a gateway with these settings does not connect to it: {result.refusal}", f"{other}{opens}"
        if result.problem is ProbeProblem.ACCESS_REFUSED:
            key = "is the key right?" if self.has_key else "a server that requires a key gets it with --api-key."
            return "the server refuses access (status 403)", f"{key} {HOST_HEADER}"
        advice = _CAUSES[result.cause] if result.cause is not None else self._problem(result)
        if advice is None:
            reason = None if result.result is None else result.result.reason
            return reason or "no answer", "look at the server's log"
        finding, remedy = advice
        settings = self.settings
        seconds = settings.first_byte_timeout_seconds if result.step is ProbeStep.CHAT else settings.health_check_timeout_seconds
        facts = {"host": self.endpoint.host, "port": self.endpoint.port, "connect": settings.connect_timeout_seconds, "seconds": seconds}
        return finding.format(**facts, status=None if result.result is None else result.result.status), remedy

    def _problem(self, result: StepResult) -> tuple[str, str] | None:
        if result.problem is ProbeProblem.NOT_JSON:
            return _PROBLEMS[ProbeProblem.NO_CHOICES if result.step is ProbeStep.CHAT else ProbeProblem.NO_LIST]
        return None if result.problem is None else _PROBLEMS.get(result.problem)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
