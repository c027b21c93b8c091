"""The command `check`: what a gateway would find at a server, one step after the other."""

import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import click
import httpx2

from multiverse_gateway._version import __version__
from multiverse_gateway.cli.common import json_option, print_json, printable, settings_here, trimmed
from multiverse_gateway.core.abilities import lacks_chat
from multiverse_gateway.core.access import HOST_HEADER
from multiverse_gateway.core.addresses import AddressPolicy, Endpoint, EndpointError, parse_root, refusal_of_any
from multiverse_gateway.core.refusals import lacks_model
from multiverse_gateway.core.servers import is_among
from multiverse_gateway.settings import Settings

MAX_BODY = 1 << 20


@attrs.frozen
class Step:
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
    """Find out step by step whether a gateway could use a model server.

    The exit code is 0 if it could, and 1 if not; the last step then says why.
    """
    settings = settings_here()
    model, api_key = trimmed(model), trimmed(api_key)
    policy = AddressPolicy.parse("true" if allow_private else settings.allow_private_networks)
    steps = []
    for step in examine(url, model=model, api_key=api_key, policy=policy, settings=settings):
        steps.append(step)
        if not as_json:
            _print_step(step)
    passed = all(step.passed for step in steps)
    if as_json:
        print_json({"url": url, "passed": passed, "steps": [attrs.asdict(step) for step in steps]})
    else:
        click.echo("\nA gateway can use this server." if passed else "\nA gateway cannot use this server yet.")
    raise SystemExit(0 if passed else 1)


def _print_step(step: Step) -> None:
    mark = "FAILED" if not step.passed else "note" if step.remedy else "ok"
    click.echo(f"{mark:>6}  {step.name}: {printable(step.finding)}")
    if step.remedy:
        click.echo(f"        -> {printable(step.remedy)}")


def examine(url: str, *, model: str | None, api_key: str | None, policy: AddressPolicy, settings: Settings) -> Iterator[Step]:
    """Yield the result of each step, and stop at the first failure on which the next step depends."""
    try:
        endpoint = parse_root(url)
    except EndpointError as error:
        yield Step("URL", False, str(error), "give the server's root, such as http://gpu.example:8000")
        return
    yield Step("URL", True, endpoint.url)

    addresses = _resolve(endpoint)
    if isinstance(addresses, Step):
        yield addresses
        return
    yield Step("name", True, f"{endpoint.host} is {', '.join(addresses)}")
    yield _judge(addresses, endpoint.port, policy)

    connected = _connect(addresses, endpoint.port, settings.connect_timeout_seconds)
    yield connected
    if not connected.passed:
        return
    headers = {"user-agent": f"multiverse-gateway/{__version__}", "accept-encoding": "identity"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    timeout = settings.health_check_timeout_seconds
    with httpx2.Client(headers=headers, timeout=timeout, trust_env=False, verify=settings.verify_backend_tls) as http:
        yield from _talk(http, endpoint, model, settings)


def _resolve(endpoint: Endpoint) -> list[str] | Step:
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        words = error.strerror if isinstance(error, socket.gaierror) else "it is no host name"
        return Step("name", False, f"{endpoint.host} cannot be resolved ({words})", "check the spelling; a tunnel may have a new address")
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def _judge(addresses: list[str], port: int, policy: AddressPolicy) -> Step:
    reason = refusal_of_any(addresses, port, policy)
    if reason is None:
        return Step("address", True, "a gateway may dial it")
    remedy = "use a public address or a tunnel"
    if reason.is_openable:
        remedy += ", or open the network with MULTIVERSE_ALLOW_PRIVATE_NETWORKS (here: --allow-private)"
    return Step("address", False, f"a gateway with these settings will not dial it: {reason}", remedy)


def _connect(addresses: list[str], port: int, timeout: float) -> Step:
    began = time.monotonic()
    problem: OSError | None = None
    for address in addresses:
        try:
            with socket.create_connection((address, port), timeout):
                return Step("connection", True, f"{address} port {port} in {1000 * (time.monotonic() - began):.0f} ms")
        except OSError as error:
            problem = error
    if isinstance(problem, TimeoutError):
        return Step("connection", False, f"no answer within {timeout:g} seconds", "is the machine on? A firewall may drop what comes in")
    if isinstance(problem, ConnectionRefusedError):
        remedy = "start the server; if it runs, let it listen on this address (--host 0.0.0.0) and this port"
        return Step("connection", False, f"port {port} is closed", remedy)
    words = problem.strerror if problem is not None else "no address"
    return Step("connection", False, str(words), "is the network up, and the address right?")


def _talk(http: httpx2.Client, endpoint: Endpoint, model: str | None, settings: Settings) -> Iterator[Step]:
    answer = _request(http, "GET", f"{endpoint.url}/v1/models", "model list", settings.health_check_timeout_seconds)
    if isinstance(answer, Step):
        yield answer
        return
    names = _names(answer)
    if names is None:
        yield Step(
            "model list", False, "GET /v1/models answers 200, but no OpenAI list", "is this the root URL of an OpenAI-compatible server?"
        )
        return
    yield Step("model list", True, f"GET /v1/models answers with {len(names)} models")
    if model is None and not names:
        yield Step("models", False, "the list is empty", "load a model, or name the one to use with --model")
        return
    if model is not None and names and not is_among(model, names):
        yield Step("models", True, f"{model} is not in the list: {_some(names)}", "many servers take any name; else register one of these")
    else:
        yield Step("models", True, _some(names) if names else f"the list is empty; {model} is tried all the same")
    yield _chat(http, endpoint, model or names[0], settings)


def _chat(http: httpx2.Client, endpoint: Endpoint, model: str, settings: Settings) -> Step:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    began = time.monotonic()
    timeout = settings.first_byte_timeout_seconds
    answer = _request(
        http, "POST", f"{endpoint.url}/v1/chat/completions", "chat", timeout, json=body, timeout=timeout, accepts_refusal=True
    )
    if isinstance(answer, Step):
        return answer
    if lacks_chat(answer.status_code, answer.content):
        return _other_abilities(http, endpoint, model, timeout)
    if answer.status_code != 200:
        return _bad_status("chat", answer, has_key=_has_key(http))
    choices = _json(answer).get("choices")
    if not isinstance(choices, list) or not choices:
        return Step("chat", False, "the answer has no choices", "is this an OpenAI-compatible chat model?")
    return Step("chat", True, f"{model} made one token in {time.monotonic() - began:.1f} s")


OTHER_CALLS: Mapping[str, tuple[str, Mapping[str, object], str]] = {
    "/v1/embeddings": ("makes embeddings", {"input": "Hi"}, "data"),
    "/v1/rerank": ("ranks documents", {"query": "Hi", "documents": ["Hi"]}, "results"),
    "/v1/completions": ("completes text", {"prompt": "Hi", "max_tokens": 1}, "choices"),
}
"""Calls that a server without chat may support: what it does then, the fields to send besides the model, and the list in the answer."""


def _other_abilities(http: httpx2.Client, endpoint: Endpoint, model: str, timeout: float) -> Step:
    for path, (words, fields, listed) in OTHER_CALLS.items():
        answer = _request(http, "POST", f"{endpoint.url}{path}", "chat", timeout, json={"model": model, **fields}, timeout=timeout)
        if not isinstance(answer, Step) and isinstance(_json(answer).get(listed), list):
            return Step("chat", True, f"no chat: {model} {words}")
    return Step("chat", True, "no chat", "is it meant to chat? If so, load a chat model, or give the model a chat template")


def _has_key(http: httpx2.Client) -> bool:
    return "authorization" in http.headers


def _request(
    http: httpx2.Client, method: str, url: str, name: str, within: float, *, accepts_refusal: bool = False, **more: Any
) -> httpx2.Response | Step:
    """Return an answer with status 200, with `accepts_refusal` one of any status, or the step that says what was wrong."""
    try:
        with http.stream(method, url, **more) as answer:
            size = 0
            pieces = []
            for piece in answer.iter_bytes():
                size += len(piece)
                if size > MAX_BODY:
                    return Step(name, False, "the answer is larger than 1 MiB", "is this the root URL of a model server?")
                pieces.append(piece)
    except httpx2.TimeoutException:
        return Step(name, False, f"no answer within {within:g} seconds", "is the model still loading, or the machine busy?")
    except httpx2.ConnectError as error:
        return Step(name, False, f"no connection ({error})", "is it https or http? Is the certificate valid for this name?")
    except httpx2.HTTPError as error:
        return Step(
            name, False, f"the connection broke ({str(error) or type(error).__name__})", "is it https or http? Look at the server's log"
        )
    whole = httpx2.Response(answer.status_code, headers=_plain(answer), content=b"".join(pieces))
    return whole if accepts_refusal or whole.status_code == 200 else _bad_status(name, whole, has_key=_has_key(http))


def _plain(answer: httpx2.Response) -> list[tuple[str, str]]:
    return [(key, value) for key, value in answer.headers.items() if key not in ("content-encoding", "transfer-encoding", "content-length")]


def _bad_status(name: str, answer: httpx2.Response, *, has_key: bool) -> Step:
    status = answer.status_code
    if "ngrok-error-code" in answer.headers or "ERR_NGROK" in answer.text[:4096]:
        return Step(name, False, "the tunnel answers, but nothing is behind it", "start the server, then the tunnel to its port")
    if status == 403:
        key = "is the key right?" if has_key else "a server that wants a key gets it with --api-key."
        return Step(name, False, "the server refuses access (status 403)", f"{key} {HOST_HEADER}")
    if status == 401 and has_key:
        return Step(name, False, "the server refuses the key (status 401)", "give its key with --api-key, and the same when registering")
    if status == 401:
        return Step(name, False, "the server asks for a key (status 401)", "give its key with --api-key, and the same when registering")
    if 300 <= status < 400:
        return Step(name, False, f"the server redirects (status {status})", "give the URL that it redirects to; a gateway follows none")
    if status == 404 and lacks_model(answer.content, b""):
        return Step(name, False, "the server does not know the model (status 404)", "give one of its models with --model")
    if status == 404:
        return Step(name, False, "the path is not there (status 404)", "give the root URL, without /v1; is it an OpenAI-compatible server?")
    if status in (429, 503):
        return Step(name, False, f"the server is loading or busy (status {status})", "wait a little and check again")
    return Step(name, False, f"status {status}", "look at the server's log")


def _json(answer: httpx2.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _names(answer: httpx2.Response) -> list[str] | None:
    data = _json(answer).get("data")
    if not isinstance(data, list):
        return None
    return [str(item["id"]) for item in data if isinstance(item, dict) and "id" in item]


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
