"""Ask engines about themselves: the requests of `core.engine_facts` over the gateway's own client, which dials by its address policy.

1. Nothing here can fail: an engine that does not answer, or not like one that we know, says nothing.
2. An engine is asked when a server of it is registered, when it returns, when its list of models has changed, and every `READ_EVERY`
   seconds: after a good probe, by the process that probes. The servers of one host have one engine, which is asked once.
"""

from collections.abc import Callable, Collection, Iterable

import anyio
import attrs

from multiverse_gateway.access_checks import headers
from multiverse_gateway.core.content_types import is_identity
from multiverse_gateway.core.engine_facts import Answers, EngineFacts, Question, next_questions, read_engine
from multiverse_gateway.core.engine_facts.documents import MAX_DOCUMENT, document
from multiverse_gateway.core.engine_facts.questions import LIST
from multiverse_gateway.core.servers import HostId, Server, ServerId
from multiverse_gateway.health_book import HealthBook
from multiverse_gateway.protocols import Client, ProbeResult

READ_EVERY = 600.0
"""Seconds after which what an engine says is read again."""
READ_SECONDS = 3.0
"""How long one server may take for all that is read from it."""
MAX_READINGS = 8
"""How many engines one process reads at once because it is time to; a registration waits for no other reading."""
MAX_ROUNDS = 4
"""How often the answers may lead to further questions."""
MAX_AT_ONCE = 8
"""How many questions one server gets at once."""


async def read_engine_of(
    server: Server,
    http: Client,
    *,
    models: Collection[str] = (),
    owned_by: str | None = None,
    listing: object = None,
    before: EngineFacts | None = None,
    seconds: float = READ_SECONDS,
) -> EngineFacts | None:
    """Return what the engine behind a server says, `None` if it says nothing; the questions are asked with the stored key.

    `models` are the models that matter besides the server's own. `owned_by` is what the server's list of models says, `None` if it is
    unknown, and `listing` is that list as it was decoded, if it was read just now. `before` is what was read last: a known engine is asked
    less. The reading takes at most `seconds`; what was answered until then counts.
    """
    answers: Answers = {} if listing is None else {LIST: listing}
    wanted = {server.asked_model, *models}
    with anyio.move_on_after(seconds):
        for _ in range(MAX_ROUNDS):
            questions = next_questions(answers, models=wanted, owned_by=owned_by, before=before)
            if not questions:
                break
            with anyio.move_on_after(seconds / 2):  # a question that is never answered must not prevent the next ones
                await _ask_all(server, http, questions, answers)
            answers |= {question: None for question in questions if question not in answers}
    return read_engine(answers, before=before)


async def _ask_all(server: Server, http: Client, questions: Iterable[Question], answers: Answers) -> None:
    limiter = anyio.CapacityLimiter(MAX_AT_ONCE)

    async def ask(question: Question) -> None:
        async with limiter:
            answers[question] = await _ask(server, http, question)

    async with anyio.create_task_group() as group:
        for question in questions:
            group.start_soon(ask, question)


async def _ask(server: Server, http: Client, question: Question) -> object:
    try:
        return document(*await _answer(server, http, question))
    except Exception:  # noqa: BLE001  whatever a stranger's server does, it only says nothing
        return None


async def _answer(server: Server, http: Client, question: Question) -> tuple[int, bytes]:
    """Return the status and the body of an answer; a body that is compressed or too large is empty."""
    method, sent = ("GET", {}) if question.body is None else ("POST", {"content-type": "application/json"})
    url = f"{server.endpoint_url}{question.target}"
    request = http.build_request(method, url, headers={**headers(server), **sent}, content=question.body)
    response = await http.send(request, stream=True)
    try:
        body = bytearray()
        if is_identity(response.headers.get("content-encoding", "").encode()):
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_DOCUMENT:
                    return response.status_code, b""
        return response.status_code, bytes(body)
    finally:
        await response.aclose()


@attrs.frozen
class Reading:
    """What an engine said at the monotonic instant `at`, `None` if nothing.

    `listed` are the models that it listed then, and `servers` its servers, each with its generation.
    """

    engine: EngineFacts | None
    listed: tuple[str, ...]
    servers: frozenset[tuple[ServerId, int]]
    at: float


class EngineBook:
    """What the engines behind the servers said last, to this process, and when they are to be asked again.

    `seconds` is how long one reading may take. What was read becomes part of the health of the servers.
    """

    def __init__(
        self, client_for: Callable[[Server], Client], health_book: Callable[[], HealthBook], *, now: Callable[[], float], seconds: float
    ) -> None:
        self._client_for = client_for
        self._health_book = health_book
        self._now = now
        self._seconds = seconds
        self._limiter = anyio.CapacityLimiter(MAX_READINGS)
        self._readings: dict[HostId, Reading] = {}

    async def read(self, server: Server, result: ProbeResult | None = None) -> EngineFacts | None:
        """Ask the engine of a server now; `result` is the probe that the server has just passed. Nothing is noted in its health."""
        models = [other.asked_model for other in self._servers_of(server.host_id)]
        return await self._read(server, result, models, before=None)

    async def renew(self, server: Server, result: ProbeResult) -> None:
        """Ask the engine of a server that was registered or changed, whenever it was asked last, and note what it says."""
        self._readings.pop(server.host_id, None)
        await self.follow(server, result)

    async def follow(self, server: Server, result: ProbeResult) -> None:
        """Ask the engine of a server that was probed, if that is due, and note what it says in the health of all its servers."""
        host_id = server.host_id
        if not result.passed:
            self._readings.pop(host_id, None)  # it may return as something else
            return
        last = self._readings.get(host_id)
        if last is not None and (last.listed != result.models or (server.id, server.generation) not in last.servers):
            last = None
        if last is not None and self._now() < last.at + READ_EVERY:
            return
        servers = self._servers_of(host_id)
        reading = Reading(None, result.models, frozenset((other.id, other.generation) for other in servers), self._now())
        self._readings[host_id] = reading  # the other servers of the engine need not ask, too
        models = [other.asked_model for other in servers]
        async with self._limiter:
            engine = await self._read(server, result, models, before=None if last is None else last.engine)
        if engine is None:
            return
        self._readings[host_id] = attrs.evolve(reading, engine=engine)
        self._forget_removed()
        for other in servers:
            self._health_book().note_measured(other, engine.of(other.asked_model))

    async def _read(
        self, server: Server, result: ProbeResult | None, models: Collection[str], *, before: EngineFacts | None
    ) -> EngineFacts | None:
        return await read_engine_of(
            server,
            self._client_for(server),
            models=models,
            owned_by=None if result is None else result.owned_by,
            listing=None if result is None else result.listing,
            before=before,
            seconds=self._seconds,
        )

    def _servers_of(self, host_id: HostId) -> list[Server]:
        return [route.server for route in self._health_book().table.routes_of(host_id)]

    def _forget_removed(self) -> None:
        registered = {route.server.host_id for route in self._health_book().table.routes.values()}
        self._readings = {host_id: reading for host_id, reading in self._readings.items() if host_id in registered}
