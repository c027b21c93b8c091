"""Ask a server for its list of models."""

from collections.abc import Collection, Iterable
from functools import partial

import attrs

from multiverse_gateway.access_checks import headers
from multiverse_gateway.core.caps import owner_of
from multiverse_gateway.core.health.listing import EMPTY_LIST, UNLISTED
from multiverse_gateway.core.lenient import decode
from multiverse_gateway.core.servers import Server, is_among
from multiverse_gateway.probes.asking import Finding, ask
from multiverse_gateway.protocols import Client, ProbeProblem, ProbeResult
from multiverse_gateway.settings import Settings

MAX_MODELS = 1000
MAX_NAME = 256
_COMPATIBLE = "does the URL lead to an OpenAI-compatible server?"


class ModelsProbe:
    """`GET {endpoint_url}/v1/models` with the server's own key: status 200 and a JSON list of models pass.

    The list stands under `data` (OpenAI) or `models`, or is the whole answer. If the list lacks the registered model, the probe passes with
    a warning: many servers answer to any name.
    """

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Probe one server. The caller owns the timeout."""
        request = http.build_request("GET", f"{server.endpoint_url}/v1/models", headers=headers(server))
        return await ask(server, http, request, partial(judge, server.asked_model))

    def result_for(self, server: Server, result: ProbeResult) -> ProbeResult:
        """Return what the list that another server of the same host gave shows about this one."""
        warning = _warning(server.asked_model, result.models) if result.passed else result.warning
        return attrs.evolve(result, server_id=server.id, generation=server.generation, warning=warning, let_in=False)


def judge(model: str, status: int, body: bytes) -> Finding:
    """Return what an answer to GET /v1/models shows about a server that is registered with `model`.

    >>> finding = judge("tiny", 200, b'{"data": [{"id": "tiny"}]}')
    >>> finding.reason is None, finding.models
    (True, ('tiny',))
    >>> judge("tiny", 200, b"<html>").reason
    'the answer to /v1/models is not JSON: does the URL lead to an OpenAI-compatible server?'
    """
    if status != 200:
        problem = ProbeProblem.NOT_FOUND if status == 404 else ProbeProblem.STATUS
        return Finding(reason=f"/v1/models returns status {status}: {_COMPATIBLE}", problem=problem)
    try:
        answer = decode(body)
    except (ValueError, RecursionError):
        return Finding(reason=f"the answer to /v1/models is not JSON: {_COMPATIBLE}", problem=ProbeProblem.NOT_JSON)
    listed = _listed(answer)
    if listed is None:
        return Finding(reason=f"the answer to /v1/models has no list of models: {_COMPATIBLE}", problem=ProbeProblem.NO_LIST)
    names, owned_by = tuple(_names(listed))[:MAX_MODELS], owner_of(listed, model)
    return Finding(models=names, warning=_warning(model, names), owned_by=owned_by, listing=answer)


def _warning(model: str, names: Collection[str]) -> str | None:
    if not names:
        return EMPTY_LIST
    return None if is_among(model, names) else UNLISTED


def _listed(answer: object) -> list[object] | None:
    if isinstance(answer, dict):
        if "data" in answer and answer["data"] is None:
            return []  # Ollama's way to say that it has none
        answer = answer.get("data", answer.get("models"))
    return answer if isinstance(answer, list) else None


def _names(listed: Iterable[object]) -> Iterable[str]:
    for item in listed:
        name = next((item[key] for key in ("id", "name", "model") if key in item), None) if isinstance(item, dict) else item
        if isinstance(name, str):
            yield name[:MAX_NAME]


def create(settings: Settings) -> ModelsProbe:
    """Return a new probe of this kind; the entry point of the plug-in."""
    return ModelsProbe()
