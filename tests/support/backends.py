"""Model servers on raw sockets, which behave as badly as a test wants and count what happened to them.

    with Backend("alice") as alice:                 # `async with` runs it on the test's own loop instead
        alice.behave = [status(500), good()]        # one per request; the last one stays
        ...                                         # send requests to alice.url
        assert alice.hits == 2

The behaviors are in `support.behaviours`. Requests for the model list are answered by `behave_models` and are not mixed
with the others. All counts may be read, and all behaviors changed, from any thread at any time.
"""

from __future__ import annotations

import asyncio
import enum
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from support import answers
from support.sockets import LoopServer, set_reset_on_close

PAYLOAD_KEPT = 4 * 1024 * 1024
HIGH_WATER = 64 * 1024
CLOSING_TIMEOUT = 5.0


class Outcome(enum.Enum):
    """What became of one request."""

    RUNNING = "running"
    COMPLETED = "completed"
    """The behavior did all it wanted to do (even a reset)."""
    ABORTED = "aborted"
    """The peer left first."""
    STOPPED = "stopped"
    """The backend was closed first."""


@attrs.define(eq=False)
class Received:
    """One request as it arrived, and what became of it. Times are `time.monotonic()` seconds."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in order of arrival."""
    body: bytes
    connection: int
    """Number of the connection it came on, from 1."""
    received_at: float
    ended_at: float | None = None
    outcome: Outcome = Outcome.RUNNING
    sent: int = 0
    """Bytes written so far, framing included."""
    payload: bytearray = attrs.field(factory=bytearray, repr=False)
    """The answer's body as sent, without head and chunk sizes; the first 4 MiB of it."""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """Return the first header called `name`, or None."""
        return next((value for key, value in self.headers if key == name.lower()), None)

    def asked(self, key: str, default: Any = None) -> Any:
        """Return `key` of the JSON body, or `default` when there is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return default
        return value.get(key, default) if isinstance(value, dict) else default

    @property
    def wants_stream(self) -> bool:
        """Whether a stream was asked for."""
        return self.asked("stream") is True


Behaviour = Callable[["Exchange"], Awaitable[None]]


def parse_request(data: bytearray, connection: int) -> tuple[Received, int] | None:
    """Return the first request in `data` and its length, or None while it is incomplete.

    Raises:
        ValueError: this is not HTTP/1.1.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = bytes(data[:end]).decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"not HTTP/1.1: {first!r}")
    pairs = [line.partition(":") for line in lines]
    headers = tuple((name.lower(), value.strip()) for name, _, value in pairs)
    known = dict(headers)
    body_start = end + 4
    if "chunked" in known.get("transfer-encoding", "").lower():
        dechunked = dechunk(data, body_start)
        if dechunked is None:
            return None
        body, length = dechunked
    else:
        length = body_start + int(known.get("content-length", "0"))
        if len(data) < length:
            return None
        body = bytes(data[body_start:length])
    return Received(method, target, headers, body, connection, time.monotonic()), length


def dechunk(data: bytearray, position: int) -> tuple[bytes, int] | None:
    """Return the chunked body that begins at `position` and where it ends, or None while it is incomplete."""
    pieces: list[bytes] = []
    while True:
        line_end = data.find(b"\r\n", position)
        if line_end < 0:
            return None
        size = int(bytes(data[position:line_end]).partition(b";")[0], 16)
        piece_start = line_end + 2
        if len(data) < piece_start + size + 2:
            return None
        if size == 0:
            trailer_end = piece_start if data[piece_start : piece_start + 2] == b"\r\n" else data.find(b"\r\n\r\n", piece_start) + 2
            return None if trailer_end < piece_start else (b"".join(pieces), trailer_end + 2)
        pieces.append(bytes(data[piece_start : piece_start + size]))
        position = piece_start + size + 2


class Exchange:
    """One request being answered: what a behavior gets. It is canceled when the peer leaves."""

    def __init__(self, backend: Backend, link: Link, request: Received) -> None:
        """Made by the backend, one per request."""
        self.backend = backend
        self.request = request
        self.cut: Callable[[], int] | None = None
        """When set, everything sent is split into pieces of the sizes it returns."""
        self._link = link

    @property
    def model(self) -> str:
        """The model that was asked for."""
        model = self.request.asked("model")
        return model if isinstance(model, str) else "unknown"

    @property
    def peer(self) -> tuple[str, int]:
        """Where the connection comes from."""
        host, port = self._link.transport.get_extra_info("peername")[:2]
        return host, port

    async def send(self, data: bytes) -> None:
        """Write bytes as they are; wait while the peer does not read."""
        if self.cut is None:
            await self._write(data)
            return
        while data:
            size = max(1, self.cut())
            await self._write(data[:size])
            await asyncio.sleep(0)
            data = data[size:]

    async def _write(self, data: bytes) -> None:
        if self._link.transport.is_closing():
            await self.forever()
        self._link.transport.write(data)
        self.request.sent += len(data)
        await self._link.writable.wait()

    async def head(self, status: int = 200, headers: Sequence[tuple[str, str]] = (), *, reason: str = "Whatever") -> None:
        """Send status line and headers, exactly these."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        await self.send(f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n".encode("latin-1"))

    async def answer(
        self, status: int, body: bytes, *, content_type: str | None = "application/json", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Send a complete answer of known length, in one write."""
        self._keep(body)
        typed = () if content_type is None else (("content-type", content_type),)
        lines = "".join(f"{name}: {value}\r\n" for name, value in (*typed, *headers, ("content-length", str(len(body)))))
        await self.send(f"HTTP/1.1 {status} Whatever\r\n{lines}\r\n".encode("latin-1") + body)

    async def start_stream(
        self, *, status: int = 200, content_type: str = "text/event-stream; charset=utf-8", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Send the head of a chunked answer."""
        await self.head(status, [("content-type", content_type), *headers, ("transfer-encoding", "chunked")])

    async def chunk(self, data: bytes, *, last: bool = False) -> None:
        """Send `data` as one chunk; with `last` the end of the body goes out in the same write."""
        self._keep(data)
        await self.send(b"%x\r\n%s\r\n%s" % (len(data), data, b"0\r\n\r\n" if last else b""))

    async def end(self) -> None:
        """End a chunked body."""
        await self.send(b"0\r\n\r\n")

    def close(self) -> None:
        """Close the connection by FIN, after what was written."""
        self._link.leave()

    def reset(self) -> None:
        """Close the connection by RST, now."""
        self._link.leave(reset=True)

    async def forever(self) -> None:
        """Do nothing until the peer leaves or the backend is closed."""
        await asyncio.get_running_loop().create_future()

    def _keep(self, data: bytes) -> None:
        room = PAYLOAD_KEPT - len(self.request.payload)
        if room > 0:
            self.request.payload += data[:room]


class Link(asyncio.Protocol):
    """One connection to a backend: parses requests, runs a behavior for each, notices when the peer leaves."""

    def __init__(self, backend: Backend, number: int) -> None:
        """Made by the backend, one per connection."""
        self.transport: asyncio.Transport
        self.writable = asyncio.Event()
        self.writable.set()
        self._backend = backend
        self._number = number
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._request: Received | None = None
        self._left_by_us = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count, and greet as the backend wishes."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._backend.note_opened(self)
        if self._backend.on_accept != "serve":
            self.leave(reset=self._backend.on_accept == "reset")

    def data_received(self, data: bytes) -> None:
        """Collect."""
        self._buffer += data
        self._next()

    def _next(self) -> None:
        if self._task is not None or self._left_by_us or not self._buffer:
            return
        try:
            parsed = parse_request(self._buffer, self._number)
        except ValueError:
            self._backend.garbage += 1
            self.leave()
            return
        if parsed is not None:
            self._request, length = parsed
            del self._buffer[:length]
            self._task = asyncio.get_running_loop().create_task(self._answer(self._request))

    async def _answer(self, request: Received) -> None:
        behaviour = self._backend.note_request(request)
        try:
            await behaviour(Exchange(self._backend, self, request))
            request.outcome = Outcome.COMPLETED
        except asyncio.CancelledError:
            if request.outcome is Outcome.RUNNING:
                request.outcome = Outcome.STOPPED
            raise
        except Exception as error:
            self._backend.errors.append(error)
            self.leave(reset=True)
        finally:
            self._backend.note_ended(request)
            self._task = self._request = None
        self._next()

    def leave(self, *, reset: bool = False) -> None:
        """Close from our side."""
        self._left_by_us = True
        if reset:
            set_reset_on_close(self.transport.get_extra_info("socket"))
            self.transport.abort()
        else:
            self.transport.close()

    def stop(self) -> asyncio.Task[None] | None:
        """Drop the connection and cancel what runs on it; return the task to wait for."""
        self.leave(reset=True)
        if self._task is not None:
            self._task.cancel()
        return self._task

    def eof_received(self) -> bool | None:
        """Take the peer's FIN for leaving (a gateway has no reason to half-close)."""
        self._peer_left()
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """Count."""
        self._peer_left()
        if self._task is not None:  # a behaviour that goes on after it closed the connection
            self._task.cancel()
        self._backend.note_closed(self)

    def _peer_left(self) -> None:
        self.writable.set()
        if self._task is None or self._request is None or self._left_by_us or self._request.outcome is not Outcome.RUNNING:
            return
        self._request.outcome = Outcome.ABORTED
        self._request.ended_at = time.monotonic()
        self._task.cancel()

    def pause_writing(self) -> None:
        """Hold senders: the peer does not read."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """Let senders go on: the peer reads again."""
        self.writable.set()


ENGINE_PATHS = (
    *("/props", "/version", "/server_info", "/get_server_info", "/get_model_info", "/info"),
    *("/api/tags", "/api/ps", "/api/v1/models", "/api/v0/models"),
)
"""Where engines state facts about themselves, besides the list of models."""


def script_of(behaviours: Behaviour | Sequence[Behaviour]) -> list[Behaviour]:
    """Return what to do for the next requests, the last one for all that follow."""
    script = [behaviours] if callable(behaviours) else list(behaviours)
    if not script:
        raise ValueError("a script needs at least one behaviour")
    return script


async def answer_well(exchange: Exchange) -> None:
    """Answer as a good server does, at once: the default. See `support.behaviours.good` for the variants."""
    request = exchange.request
    if request.wants_stream:
        usage = (request.asked("stream_options") or {}).get("include_usage") is True
        events = answers.events(request.path, speaker=exchange.backend.name, model=exchange.model, usage=usage)
        if events is not None:
            await exchange.start_stream()
            for event in events[:-1]:
                await exchange.chunk(event)
            await exchange.chunk(events[-1], last=True)
            return
    body = answers.body(request.path, speaker=exchange.backend.name, model=exchange.model)
    if body is None:
        await exchange.answer(404, answers.error_body(f"no such path: {request.path}", kind="invalid_request_error"))
    else:
        await exchange.answer(200, body)


async def list_models(exchange: Exchange) -> None:
    """Answer GET /v1/models with the backend's `models`, or with the list that its engine states."""
    if "/v1/models" in exchange.backend.states:
        await exchange.answer(200, answers.packed(exchange.backend.states["/v1/models"]))
        return
    await exchange.answer(200, answers.model_list(exchange.backend.models, owner=exchange.backend.owned_by))


async def state_figures(exchange: Exchange) -> None:
    """Answer with what the backend's engine states about itself at this path, if it states anything."""
    states = exchange.backend.states
    stated = states.get(exchange.request.target, states.get(exchange.request.path))
    if stated is None:
        await exchange.answer(404, answers.error_body("Not Found", kind="invalid_request_error"))
    else:
        await exchange.answer(200, answers.packed(stated))


async def reject_nothing(exchange: Exchange) -> None:
    """Answer an empty object as every server does that lets the gateway in."""
    await exchange.answer(400, answers.error_body("a model is required", kind="invalid_request_error"))


def is_for_models(request: Received) -> bool:
    """Return whether a request is for the model list."""
    return request.method == "GET" and request.path.endswith("/models") and not request.path.endswith(ENGINE_PATHS)


def is_for_access(request: Received) -> bool:
    """Return whether a gateway asks whether it is let in."""
    return request.method == "POST" and request.body == b"{}"


def is_for_trial(request: Received) -> bool:
    """Return whether a gateway asks for the one token that shows whether a server has a model; its chat probe asks for the same."""
    return (
        request.method == "POST" and request.asked("max_tokens") == 1 and request.asked("messages") == [{"role": "user", "content": "Hi"}]
    )


def is_for_engine(request: Received) -> bool:
    """Return whether a gateway reads what the engine states about itself."""
    return request.path.endswith("/api/show" if request.method == "POST" else ENGINE_PATHS)


class Backend(LoopServer):
    """A model server whose behavior is a script."""

    def __init__(
        self,
        name: str = "backend",
        behave: Behaviour | Sequence[Behaviour] = answer_well,
        *,
        models: Sequence[str] = ("test-model",),
        behave_models: Behaviour | Sequence[Behaviour] = list_models,
        behave_access: Behaviour | Sequence[Behaviour] = reject_nothing,
        host: str = "127.0.0.1",
        port: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; it listens once it is entered. `name` stands in every good answer, so tests see who gave it."""
        super().__init__(host=host, port=port)
        self.name = name
        self.models = tuple(models)
        self.on_accept: Literal["serve", "reset", "close"] = "serve"
        """What to do with a connection before any request: serve it, or end it by RST or FIN."""
        self._tls = tls
        self._script = script_of(behave)
        self._models_script = script_of(behave_models)
        self._access_script = script_of(behave_access)
        self._links: set[Link] = set()
        self.requests: list[Received] = []
        """All requests but those for the model list, those with an empty object, and those for what the engine states."""
        self.probes: list[Received] = []
        """Requests for the model list."""
        self.accesses: list[Received] = []
        """Requests with an empty object, by which a gateway finds out whether it is let in."""
        self.readings: list[Received] = []
        """Requests for what the engine states about itself."""
        self.trials: list[Received] = []
        """Requests for one token of a model that the backend does not list."""
        self.behave_trial: Behaviour = answer_well
        """What such a request gets: by default the backend answers to any name."""
        self.behave_engine: Behaviour = state_figures
        self.states: Mapping[str, object] = {}
        """What the engine states about itself, by path or by path and query; with "/v1/models" also the list of models."""
        self.owned_by = "vllm"
        """What the list of models says about who serves them; of vLLM a gateway reads only the version besides."""
        self.errors: list[Exception] = []
        """Mistakes in behaviors; the first one is raised when the backend is left."""
        self.connections = 0
        self.garbage = 0
        """Connections that did not speak HTTP/1.1."""
        self.running = 0
        """Requests being answered now, without those for the model list."""
        self.most_running = 0

    @property
    def url(self) -> str:
        """The root URL, without a slash at the end."""
        return super().url.replace("http", "https", 1) if self._tls else super().url

    @property
    def behave(self) -> Behaviour | list[Behaviour]:
        """What the next requests get: a behavior for all, or a list of which each request takes one and the last one stays."""
        return self._script

    @behave.setter
    def behave(self, behaviours: Behaviour | Sequence[Behaviour]) -> None:
        self._script = script_of(behaviours)

    @property
    def behave_models(self) -> Behaviour | list[Behaviour]:
        """The same for GET /v1/models."""
        return self._models_script

    @behave_models.setter
    def behave_models(self, behaviours: Behaviour | Sequence[Behaviour]) -> None:
        self._models_script = script_of(behaviours)

    @property
    def behave_access(self) -> Behaviour | list[Behaviour]:
        """The same for a POST of an empty object."""
        return self._access_script

    @behave_access.setter
    def behave_access(self, behaviours: Behaviour | Sequence[Behaviour]) -> None:
        self._access_script = script_of(behaviours)

    @property
    def hits(self) -> int:
        """How many requests came, without those for the model list."""
        return len(self.requests)

    @property
    def aborted(self) -> int:
        """How many of them the peer left before their end."""
        return sum(request.outcome is Outcome.ABORTED for request in list(self.requests))

    @property
    def completed(self) -> int:
        """How many of them got all that the behavior wanted to send."""
        return sum(request.outcome is Outcome.COMPLETED for request in list(self.requests))

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    @property
    def last(self) -> Received:
        """The latest request that is not for the model list."""
        return self.requests[-1]

    def forget(self) -> None:
        """Reset all counts and records. Requests that still run are no longer seen."""

        def clear() -> None:
            self.requests, self.probes, self.accesses, self.readings = [], [], [], []
            self.connections = self.garbage = 0
            self.most_running = self.running

        self.on_loop(clear)

    def reset_all(self) -> None:
        """Drop every open connection by RST."""

        def drop() -> None:
            for link in list(self._links):
                link.stop()

        self.on_loop(drop)

    def crash(self) -> None:
        """Refuse further connections and drop the open ones: a killed server. `accept()` brings it back."""
        self.refuse()
        self.reset_all()

    async def connected(self, connection: socket.socket) -> None:
        """Serve one connection."""
        self.connections += 1
        number = self.connections
        opening = asyncio.get_running_loop().connect_accepted_socket(lambda: Link(self, number), connection, ssl=self._tls)
        if self._tls is None:
            await opening
        else:  # a handshake must not hold up the next connection
            handshake = asyncio.ensure_future(opening)
            handshake.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def hang_up(self) -> None:
        """Drop all connections; raise the first mistake of a behavior."""
        await asyncio.sleep(0)
        tasks = [task for task in [link.stop() for link in list(self._links)] if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_TIMEOUT)
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors[0]

    def note_opened(self, link: Link) -> None:
        """Count a link that began."""
        self._links.add(link)

    def note_closed(self, link: Link) -> None:
        """Count a link that ended."""
        self._links.discard(link)

    def note_request(self, request: Received) -> Behaviour:
        """Record a request and choose its behavior."""
        if is_for_models(request):
            self.probes.append(request)
            script = self._models_script
        elif is_for_access(request):
            self.accesses.append(request)
            script = self._access_script
        elif is_for_engine(request):
            self.readings.append(request)
            script = [self.behave_engine]
        elif self._is_for_trial(request):
            self.trials.append(request)
            script = [self.behave_trial]
        else:
            self.requests.append(request)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            script = self._script
        return script.pop(0) if len(script) > 1 else script[0]

    def note_ended(self, request: Received) -> None:
        """Record the end of a request."""
        if request.ended_at is None:
            request.ended_at = time.monotonic()
        if not is_for_models(request) and not is_for_access(request) and not is_for_engine(request) and not self._is_for_trial(request):
            self.running -= 1

    def _is_for_trial(self, request: Received) -> bool:
        return is_for_trial(request) and request.asked("model") not in self.models
