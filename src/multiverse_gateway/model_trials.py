"""Ask a server for one token of a model, or for the least that a model of another kind does.

Nothing else shows whether a server has a model that it does not list. A trial is made when somebody registers or tests a server, and never
in the background: it costs the server one token.
"""

from collections.abc import Mapping
from contextlib import suppress

import anyio
import attrs
import httpx2
import msgspec

from multiverse_gateway.access_checks import headers
from multiverse_gateway.core.lenient import decode
from multiverse_gateway.core.refusals import lacks_model
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import Client, HealthProbe, ProbeProblem, ProbeResult

CHAT_SECONDS = 30.0
"""How long a gateway waits for the answer to a trial, which may have to wait for the model to load."""
ABILITIES: Mapping[str, tuple[Mapping[str, object], str]] = {
    "/v1/embeddings": ({"input": "Hi"}, "data"),
    "/v1/rerank": ({"query": "Hi", "documents": ["Hi"]}, "results"),
    "/v1/completions": ({"prompt": "Hi", "max_tokens": 1}, "choices"),
}
"""API paths that a server without chat may support: the fields to send besides the model, and the list in the answer."""


@attrs.frozen(kw_only=True)
class Trial:
    """What came of a trial: `problem` is what was wrong, `None` if the model answered or has no chat.

    `result` is that of the probe, if it ended. `ability` is the API path that a model without chat supports instead, if one was found.
    """

    result: ProbeResult | None = None
    problem: ProbeProblem | None = None
    ability: str | None = None

    @property
    def has_answered(self) -> bool:
        """Return whether the model answered a request, of whichever kind."""
        return self.problem is None and self.result is not None and (not self.result.lacks_chat or self.ability is not None)


async def try_model(server: Server, http: Client, probe: HealthProbe, *, seconds: float) -> Trial:
    """Ask a server for one token of its model by `probe`, and if the model has no chat, for what it does instead; this never raises.

    Each request has `seconds` to be answered, which may include the time to load the model.
    """
    result: ProbeResult | None = None
    try:
        with anyio.move_on_after(seconds):
            result = await probe.check(server, http)
    except Exception:  # noqa: BLE001  whatever a stranger's server does is a failed trial, in a category only
        return Trial(problem=ProbeProblem.BROKEN)
    if result is None:
        return Trial(problem=ProbeProblem.TIMEOUT)
    if not result.passed:
        return Trial(result=result, problem=result.problem or ProbeProblem.BROKEN)
    return await _without_chat(server, http, result, seconds) if result.lacks_chat else Trial(result=result)


async def _without_chat(server: Server, http: Client, result: ProbeResult, seconds: float) -> Trial:
    for path, (fields, listed) in ABILITIES.items():
        content = msgspec.json.encode({"model": server.asked_model, **fields})
        value: object = None
        with anyio.move_on_after(seconds), suppress(httpx2.RequestError, ValueError, RecursionError):
            answer = await http.post(
                f"{server.endpoint_url}{path}", headers={**headers(server), "content-type": "application/json"}, content=content
            )
            if answer.status_code != 200 and lacks_model(answer.content, content):
                return Trial(result=result, problem=ProbeProblem.UNKNOWN_MODEL)
            value = decode(answer.content) if answer.status_code == 200 else None
        if isinstance(value, dict) and isinstance(value.get(listed), list):
            return Trial(result=result, ability=path)
    return Trial(result=result)
