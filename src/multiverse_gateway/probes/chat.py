"""Ask a server for one token: slower and surer than its list of models.

A server without chat is left alone: its list of models decides.
"""

import attrs
import msgspec

from multiverse_gateway.access_checks import headers
from multiverse_gateway.core.abilities import lacks_chat
from multiverse_gateway.core.lenient import decode
from multiverse_gateway.core.refusals import lacks_model
from multiverse_gateway.core.servers import Server
from multiverse_gateway.probes.asking import Finding, ask
from multiverse_gateway.probes.models import ModelsProbe
from multiverse_gateway.protocols import Client, ProbeProblem, ProbeResult
from multiverse_gateway.settings import Settings


class ChatProbe:
    """`POST {endpoint_url}/v1/chat/completions` with the registered name and `max_tokens` 1: an answer with choices passes.

    It keeps a model loaded that its server would drop when idle, and takes a slot of the server for a moment. A server that has no chat,
    such as one for embeddings, passes with its list of models, as `ModelsProbe` judges it.
    """

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Probe one server. The caller owns the timeout."""
        body = {"model": server.asked_model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": False}
        request = http.build_request(
            "POST",
            f"{server.endpoint_url}/v1/chat/completions",
            headers={**headers(server), "content-type": "application/json"},
            content=msgspec.json.encode(body),
        )
        result = await ask(server, http, request, judge)
        if result.passed or not result.lacks_chat:
            return result
        listed = await ModelsProbe().check(server, http)
        return attrs.evolve(listed, let_in=listed.passed, lacks_chat=True)


def judge(status: int, body: bytes) -> Finding:
    """Return what an answer to a chat completion shows about the server.

    >>> judge(200, b'{"choices": [{"message": {"content": "H"}}]}').reason is None
    True
    """
    if lacks_chat(status, body):
        return Finding(reason=f"the server has no chat (status {status})", lacks_chat=True)
    if status == 404 or (status != 200 and lacks_model(body, b"")):
        reason = f"the server does not know the registered model (status {status}): is the name spelled correctly?"
        return Finding(reason=reason, problem=ProbeProblem.UNKNOWN_MODEL)
    if status != 200:
        reason = f"the answer to a chat completion has status {status}: is the model running, and can it chat?"
        return Finding(reason=reason, problem=ProbeProblem.STATUS)
    try:
        answer = decode(body)
    except (ValueError, RecursionError):
        reason = "the answer to a chat completion is not JSON: does the URL lead to an OpenAI-compatible server?"
        return Finding(reason=reason, problem=ProbeProblem.NOT_JSON)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        reason = "the answer to a chat completion has no choices: is the model running, and can it chat?"
        return Finding(reason=reason, problem=ProbeProblem.NO_CHOICES)
    return Finding(let_in=True)


def create(settings: Settings) -> ChatProbe:
    """Return a new probe of this kind; the entry point of the plug-in."""
    return ChatProbe()
