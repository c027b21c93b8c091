"""What a model server can do to a request: one small function each, for `Backend.behave`.

Each function returns a behavior. Counts called `after` are complete events sent before the trouble. Those that act
on streams send their trouble whatever was asked for. Times are seconds.
"""

from __future__ import annotations

import asyncio
import random
import threading
import zlib
from collections.abc import Sequence
from typing import Literal

from support import answers
from support.backends import Behaviour as Behaviour
from support.backends import Exchange as Exchange
from support.backends import answer_well as answer_well
from support.backends import list_models as list_models

LET_IT_ARRIVE = 0.05
"""A reset may overtake what was sent just before it: wait this long in between."""
MEBIBYTE = 1024 * 1024


def speaker_of(exchange: Exchange) -> str:
    """Return the name that stands in the answer."""
    return exchange.backend.name


async def send_events(exchange: Exchange, events: Sequence[bytes], *, interval: float = 0.0, end: bool = True) -> None:
    """Send a chunked stream of events; without `end` it is left open."""
    await exchange.start_stream()
    for number, event in enumerate(events):
        if number and interval:
            await asyncio.sleep(interval)
        await exchange.chunk(event, last=end and number == len(events) - 1)


def some_events(exchange: Exchange, count: int) -> list[bytes]:
    """Return the first `count` events of a stream that has many more to say, for whatever path was asked."""
    path = exchange.request.path
    events = answers.events(path, speaker=speaker_of(exchange), model=exchange.model, count=count + 5)
    return (events or answers.chat_events(speaker_of(exchange), exchange.model, count=count + 5))[:count]


# Good answers


def good(
    *, text: str | None = None, events: int = 5, interval: float = 0.0, first_after: float = 0.0, usage: bool | None = None
) -> Behaviour:
    """Answer well on every path: JSON, or a stream when one was asked for.

    `events` tokens are streamed `interval` apart; usage comes when it was asked for, or as `usage` says.
    """

    async def act(exchange: Exchange) -> None:
        request, name = exchange.request, speaker_of(exchange)
        await asyncio.sleep(first_after)
        if request.wants_stream:
            counted = (request.asked("stream_options") or {}).get("include_usage") is True if usage is None else usage
            stream = answers.events(request.path, speaker=name, model=exchange.model, count=events, usage=counted)
            if stream is not None:
                await send_events(exchange, stream, interval=interval)
                return
        body = answers.body(request.path, speaker=name, model=exchange.model, text=text)
        if body is None:
            await answer_well(exchange)
        else:
            await exchange.answer(200, body)

    return act


def answer(
    status: int, body: bytes, *, content_type: str | None = "application/json", headers: Sequence[tuple[str, str]] = ()
) -> Behaviour:
    """Answer exactly this."""

    async def act(exchange: Exchange) -> None:
        await exchange.answer(status, body, content_type=content_type, headers=headers)

    return act


def stream(events: Sequence[bytes], *, interval: float = 0.0, end: Literal["end", "close", "reset", "stall"] = "end") -> Behaviour:
    """Stream exactly these events, then end the body, cut it by FIN or RST, or fall silent."""

    async def act(exchange: Exchange) -> None:
        await send_events(exchange, events, interval=interval, end=end == "end")
        await finish(exchange, end)

    return act


def held_stream(goes_on: threading.Event, *, events: int = 5) -> Behaviour:
    """Stream the beginning of a good answer, and the rest when the test says so."""

    async def act(exchange: Exchange) -> None:
        whole = answers.events(exchange.request.path, speaker=speaker_of(exchange), model=exchange.model, count=events)
        assert whole is not None, "this path does not stream"
        await send_events(exchange, whole[:2], end=False)
        while not goes_on.is_set():  # noqa: ASYNC110  it belongs to the thread of the test
            await asyncio.sleep(LET_IT_ARRIVE)
        for event in whole[2:]:
            await exchange.chunk(event)
        await exchange.end()

    return act


def held(goes_on: threading.Event, first: bytes, rest: bytes) -> Behaviour:
    """Send the beginning of an answer (header lines after its status line, and body), and the rest when the test says so."""

    async def act(exchange: Exchange) -> None:
        beginning = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        if first:
            await exchange.send(beginning + first)
        while not goes_on.is_set():  # noqa: ASYNC110  it belongs to the thread of the test
            await asyncio.sleep(LET_IT_ARRIVE)
        await exchange.send(rest if first else beginning + rest)

    return act


async def finish(exchange: Exchange, end: Literal["end", "close", "reset", "stall"]) -> None:
    """End an exchange in one of the ways, after what was sent arrived."""
    if end == "stall":
        await exchange.forever()
    elif end == "close":
        exchange.close()
    elif end == "reset":
        await asyncio.sleep(LET_IT_ARRIVE)
        exchange.reset()


# Errors that a server means


def status(
    code: int,
    *,
    message: str = "it broke",
    kind: str | None = None,
    error_code: str | None = None,
    retry_after: str | float | None = None,
    body: bytes | None = None,
    content_type: str = "application/json",
    headers: Sequence[tuple[str, str]] = (),
) -> Behaviour:
    """Answer with an error of OpenAI's form (or `body`) and perhaps a Retry-After, written as given."""
    named = kind or ("server_error" if code >= 500 else "invalid_request_error")
    sent = answers.error_body(message, kind=named, code=error_code) if body is None else body
    more = () if retry_after is None else (("retry-after", str(retry_after)),)
    return answer(code, sent, content_type=content_type, headers=(*more, *headers))


def model_not_found(style: Literal["openai", "ollama", "ollama-native", "vllm"] = "openai") -> Behaviour:
    """Answer 404 in the words of that server when it does not have the model."""

    async def act(exchange: Exchange) -> None:
        await exchange.answer(404, answers.model_not_found(style, exchange.model))

    return act


def context_too_long() -> Behaviour:
    """Answer 400: the caller's mistake."""
    text = "This model's maximum context length is 2048 tokens. However, your messages resulted in 9000 tokens."
    return status(400, message=text, error_code="context_length_exceeded")


def loading() -> Behaviour:
    """Answer 503 as llama.cpp does while it loads the model."""
    return answer(503, answers.packed({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}))


def unauthorized() -> Behaviour:
    """Answer 401: the key that was stored for this server is wrong."""
    return status(401, message="Incorrect API key provided.", error_code="invalid_api_key", headers=(("www-authenticate", "Bearer"),))


def redirect(location: str, *, code: int = 302) -> Behaviour:
    """Answer 3xx with a Location."""
    return answer(code, b"", content_type=None, headers=(("location", location),))


# Silence and broken connections before the first byte


def stall() -> Behaviour:
    """Never answer."""
    return lambda exchange: exchange.forever()


def reset_first() -> Behaviour:
    """RST before the first byte."""

    async def act(exchange: Exchange) -> None:
        exchange.reset()

    return act


def eof_first() -> Behaviour:
    """FIN before the first byte."""

    async def act(exchange: Exchange) -> None:
        exchange.close()

    return act


def raw(data: bytes, *, end: Literal["end", "close", "reset", "stall"] = "close") -> Behaviour:
    """Send these bytes and nothing else, then leave the connection open, close or reset it, or fall silent."""

    async def act(exchange: Exchange) -> None:
        await exchange.send(data)
        await finish(exchange, end)

    return act


def garbage() -> Behaviour:
    """Send bytes that are not HTTP, then FIN."""
    return raw(b"\x16\x03\x01\x00\xff\x00SSH-2.0-nonsense\r\n\x00\xff\xfe\r\n\r\n")


def head_only(*, end: Literal["close", "reset", "stall"] = "stall", content_type: str = "application/json") -> Behaviour:
    """Send a good head that promises a body, then none of it."""
    return raw(f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: 100\r\n\r\n".encode(), end=end)


def partial_head(*, end: Literal["close", "reset", "stall"] = "close") -> Behaviour:
    """End in the middle of the head."""
    return raw(b"HTTP/1.1 200 OK\r\ncontent-type: appl", end=end)


# Broken plain answers


def truncated_body(*, keep: float = 0.5, end: Literal["close", "reset", "stall"] = "close") -> Behaviour:
    """Announce the whole length, send the first part (`keep` of it), then leave."""

    async def act(exchange: Exchange) -> None:
        body = answers.body("/chat/completions", speaker=speaker_of(exchange), model=exchange.model) or b""
        await exchange.head(200, [("content-type", "application/json"), ("content-length", str(len(body)))])
        await exchange.send(body[: int(len(body) * keep)])
        await finish(exchange, end)

    return act


def broken_json() -> Behaviour:
    """Answer 200 application/json with a complete body that is not JSON."""
    return answer(200, b'{"id": "chatcmpl-broken", "choices": [{"index": 0, "mess')


def wrong_content_type(content_type: str = "text/plain") -> Behaviour:
    """Send the good JSON answer under another content type."""

    async def act(exchange: Exchange) -> None:
        body = answers.body(exchange.request.path, speaker=speaker_of(exchange), model=exchange.model) or b"{}"
        await exchange.answer(200, body, content_type=content_type)

    return act


def json_for_stream() -> Behaviour:
    """Answer with plain JSON though a stream was asked for."""

    async def act(exchange: Exchange) -> None:
        body = answers.body(exchange.request.path, speaker=speaker_of(exchange), model=exchange.model) or b"{}"
        await exchange.answer(200, body)

    return act


def html_page(code: int = 200) -> Behaviour:
    """Answer with a web page."""
    page = b"<!doctype html><html><head><title>Welcome</title></head><body><h1>It works</h1></body></html>"
    return answer(code, page, content_type="text/html; charset=utf-8")


def ngrok_interstitial() -> Behaviour:
    """Answer with ngrok's warning page: 200, HTML."""
    page = b"<!DOCTYPE html><html><head><title>ngrok</title></head><body>You are about to visit (ERR_NGROK_6024)</body></html>"
    return answer(200, page, content_type="text/html", headers=(("ngrok-error-code", "ERR_NGROK_6024"),))


def ngrok_offline(*, with_header: bool = True, code: int = 404) -> Behaviour:
    """Answer as ngrok does when the tunnel is down: 404 and, in header or page, ERR_NGROK_3200."""
    page = b"<!DOCTYPE html><html><body>The endpoint sleepy.ngrok-free.app is offline. ERR_NGROK_3200</body></html>"
    headers = (("ngrok-error-code", "ERR_NGROK_3200"),) if with_header else ()
    return answer(code, page, content_type="text/html", headers=headers)


def cloudflared_530() -> Behaviour:
    """Answer as Cloudflare does when the tunnel is down: 530, error 1033."""
    page = b"<!DOCTYPE html><html><head><title>Cloudflare Tunnel error</title></head><body>Error 1033</body></html>"
    return answer(530, page, content_type="text/html; charset=UTF-8", headers=(("server", "cloudflare"), ("cf-ray", "8f0e-FRA")))


def odd_status(code: int = 999) -> Behaviour:
    """Answer with a status outside the standard."""
    return answer(code, b'{"odd":true}')


# Streams that break


def cut_stream(after: int = 3, *, half_event: bool = False, interval: float = 0.0) -> Behaviour:
    """FIN in mid-stream, without the last chunk; with `half_event` in the middle of an event."""
    return broken_stream(after, "close", half_event=half_event, interval=interval)


def reset_stream(after: int = 3, *, half_event: bool = False, interval: float = 0.0) -> Behaviour:
    """RST in mid-stream."""
    return broken_stream(after, "reset", half_event=half_event, interval=interval)


def stall_stream(after: int = 3, *, half_event: bool = False, interval: float = 0.0) -> Behaviour:
    """Fall silent in mid-stream; `after=0` sends the head only."""
    return broken_stream(after, "stall", half_event=half_event, interval=interval)


def clean_end(after: int = 3, *, interval: float = 0.0) -> Behaviour:
    """End the body properly in mid-stream: neither finish_reason nor `[DONE]`."""
    return broken_stream(after, "end", half_event=False, interval=interval)


def broken_stream(after: int, end: Literal["end", "close", "reset", "stall"], *, half_event: bool, interval: float) -> Behaviour:
    """Stream `after` events and break in one of the ways."""

    async def act(exchange: Exchange) -> None:
        events = some_events(exchange, after + 1)
        await send_events(exchange, events[:after], interval=interval, end=False)
        if half_event:
            await exchange.chunk(events[after][: len(events[after]) // 2])
        if end == "end":
            await exchange.end()
        await finish(exchange, end)

    return act


def no_done(*, events: int = 5, end: Literal["end", "close"] = "end") -> Behaviour:
    """Stream well up to finish_reason, but never send `[DONE]`; `close` means no last chunk either."""

    async def act(exchange: Exchange) -> None:
        stream = answers.events(exchange.request.path, speaker=speaker_of(exchange), model=exchange.model, count=events, done=False)
        await send_events(exchange, stream or [], end=end == "end")
        await finish(exchange, end)

    return act


def stays_open_after_done(*, more: bytes = b"") -> Behaviour:
    """Stream well up to `[DONE]`, perhaps send `more`, and never end the body."""

    async def act(exchange: Exchange) -> None:
        events = answers.events(exchange.request.path, speaker=speaker_of(exchange), model=exchange.model) or []
        await send_events(exchange, events, end=False)
        if more:
            await exchange.chunk(more)
        await exchange.forever()

    return act


def two_choices_one_finished(*, done: bool = False) -> Behaviour:
    """Stream two choices, finish only one, end the body cleanly (without `[DONE]` unless told)."""

    async def act(exchange: Exchange) -> None:
        await send_events(exchange, answers.chat_events(speaker_of(exchange), exchange.model, choices=2, finished=1, done=done))

    return act


def error_event(
    after: int = 0, *, message: str = "out of memory", named: bool = False, end: Literal["end", "close", "stall"] = "end"
) -> Behaviour:
    """Send `data: {"error": …}` as event number `after` of a stream, as the first one by default."""

    async def act(exchange: Exchange) -> None:
        head = b"event: error\n" if named else b""
        event = b"%sdata: %s\n\n" % (head, answers.error_body(message))
        await send_events(exchange, [*some_events(exchange, after), event], end=end == "end")
        await finish(exchange, end)

    return act


def comments_only(interval: float = 1.0) -> Behaviour:
    """Stream `: ping` for ever, never an event."""

    async def act(exchange: Exchange) -> None:
        await exchange.start_stream()
        while True:
            await exchange.chunk(b": ping\n\n")
            await asyncio.sleep(interval)

    return act


def not_json_event(after: int = 2) -> Behaviour:
    """Send an event whose data is not JSON among good ones, then go on well."""

    async def act(exchange: Exchange) -> None:
        events = some_events(exchange, after)
        await send_events(exchange, [*events, b"data: {not json\n\n", *some_events(exchange, 2), answers.DONE])

    return act


# Too much of something


def endless_stream(interval: float = 0.0) -> Behaviour:
    """Stream good events for ever, as fast as they are read."""

    async def act(exchange: Exchange) -> None:
        event = answers.chat_event(speaker_of(exchange), exchange.model, {"content": "again "})
        await exchange.start_stream()
        while True:
            await exchange.chunk(event)
            await asyncio.sleep(interval)

    return act


def endless_line(*, total: int | None = None, after: int = 0) -> Behaviour:
    """Stream one event that never ends, or `total` bytes of it and then a proper end."""

    async def act(exchange: Exchange) -> None:
        await send_events(exchange, some_events(exchange, after), end=False)
        await exchange.chunk(b'data: {"endless":"')
        piece, sent = b"x" * 16384, 0
        while total is None or sent < total:
            await exchange.chunk(piece)
            sent += len(piece)
            await asyncio.sleep(0)
        await exchange.chunk(b'"}\n\n' + answers.DONE, last=True)

    return act


def endless_body() -> Behaviour:
    """Send JSON that never ends."""

    async def act(exchange: Exchange) -> None:
        await exchange.start_stream(content_type="application/json")
        await exchange.chunk(b'{"endless":"')
        while True:
            await exchange.chunk(b"x" * 16384)
            await asyncio.sleep(0)

    return act


def endless_continue() -> Behaviour:
    """Send `100 Continue` for ever."""

    async def act(exchange: Exchange) -> None:
        while True:
            await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
            await asyncio.sleep(0)

    return act


def many_headers(count: int = 20_000) -> Behaviour:
    """Send a good answer under that many headers."""
    return answer(200, b"{}", headers=[(f"x-header-{number}", "value") for number in range(count)])


def big_header(size: int = MEBIBYTE) -> Behaviour:
    """Send a good answer under a header of that size."""
    return answer(200, b"{}", headers=[("x-big", "b" * size)])


def gzip_bomb(size: int = 256 * MEBIBYTE) -> Behaviour:
    """Answer with `content-encoding: gzip` and a small body that unpacks to `size` bytes of spaces."""
    body = gzip_of_spaces(size)
    return answer(200, body, headers=(("content-encoding", "gzip"),))


def encoded(encoding: str = "br", body: bytes = b"\x8b\x00\x80{}\x03") -> Behaviour:
    """Answer with a content encoding that nobody asked for."""
    return answer(200, body, headers=(("content-encoding", encoding),))


def gzip_of_spaces(size: int) -> bytes:
    """Return a gzip file of `size` spaces (rounded up to MiB), made quickly: one compressed MiB, repeated."""
    block = b" " * MEBIBYTE
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)
    count = -(-size // MEBIBYTE)
    check = 0
    for _ in range(count):
        check = zlib.crc32(block, check)
    trailer = check.to_bytes(4, "little") + (count * MEBIBYTE % 2**32).to_bytes(4, "little")
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + packed * count + b"\x03\x00" + trailer


def huge_model_list(size: int = 100 * MEBIBYTE) -> Behaviour:
    """Answer with a well-formed model list of about `size` bytes. For `behave_models`."""

    async def act(exchange: Exchange) -> None:
        await exchange.start_stream(content_type="application/json")
        await exchange.chunk(b'{"object":"list","data":[{"id":"test-model","object":"model"}')
        piece = b',{"id":"filler","object":"model"}' * 500
        for _ in range(-(-size // len(piece))):
            await exchange.chunk(piece)
            await asyncio.sleep(0)
        await exchange.chunk(b"]}", last=True)

    return act


# Malice


MALICIOUS_HEADERS = (
    ("set-cookie", "session=stolen; Path=/"),
    ("access-control-allow-origin", "https://evil.example"),
    ("access-control-allow-credentials", "true"),
    ("content-security-policy", "default-src *"),
    ("location", "https://evil.example/"),
    ("connection", "x-hop, keep-alive"),
    ("x-hop", "secret"),
    ("keep-alive", "timeout=1"),
    ("upgrade", "h2c"),
    ("alt-svc", 'h2="evil.example:443"'),
    ("strict-transport-security", "max-age=1"),
    ("clear-site-data", '"*"'),
    ("www-authenticate", "Basic"),
    ("server", "evil/6.6.6"),
    ("x-gateway-server-id", "forged"),
    ("x-multiverse-attempts", "77"),
    ("x-request-id", "forged id with spaces; and <marks>"),
)


def malicious_headers(headers: Sequence[tuple[str, str]] = MALICIOUS_HEADERS) -> Behaviour:
    """Answer well (stream or plain) under headers that must not reach a user."""

    async def act(exchange: Exchange) -> None:
        request, name = exchange.request, speaker_of(exchange)
        events = answers.events(request.path, speaker=name, model=exchange.model) if request.wants_stream else None
        if events is None:
            await exchange.answer(200, answers.body(request.path, speaker=name, model=exchange.model) or b"{}", headers=headers)
        else:
            await exchange.start_stream(headers=headers)
            await exchange.chunk(b"".join(events), last=True)

    return act


def split_header(raw_line: bytes = b"x-split: a\rset-cookie: b=c") -> Behaviour:
    """Answer well, but with one raw header line (by default a bare CR; try NUL or LF) that parsers disagree about."""

    async def act(exchange: Exchange) -> None:
        body = answers.body("/chat/completions", speaker=speaker_of(exchange), model=exchange.model) or b"{}"
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%s\r\ncontent-length: %d\r\n\r\n" % (raw_line, len(body))
        await exchange.send(head + body)

    return act


# Behaviours made of behaviours


def after(seconds: float, then: Behaviour) -> Behaviour:
    """Wait, then do `then`: a slow first byte."""

    async def act(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await then(exchange)

    return act


def in_pieces(then: Behaviour, *, seed: int = 0, largest: int = 7) -> Behaviour:
    """Do `then`, but write everything in pieces of 1 to `largest` bytes, at borders drawn from `seed`."""

    async def act(exchange: Exchange) -> None:
        chooser = random.Random(seed)
        exchange.cut = lambda: chooser.randint(1, largest)
        await then(exchange)

    return act


def when_streamed(streamed: Behaviour, plain: Behaviour) -> Behaviour:
    """Choose by whether a stream was asked for."""
    return lambda exchange: streamed(exchange) if exchange.request.wants_stream else plain(exchange)


def for_model(model: str, then: Behaviour, otherwise: Behaviour = answer_well) -> Behaviour:
    """Do `then` for requests of that model only."""
    return lambda exchange: then(exchange) if exchange.model == model else otherwise(exchange)


def for_path(ending: str, then: Behaviour, otherwise: Behaviour = answer_well) -> Behaviour:
    """Do `then` for paths with that ending only."""
    return lambda exchange: then(exchange) if exchange.request.path.endswith(ending) else otherwise(exchange)


def randomly(chance: float, then: Behaviour, otherwise: Behaviour = answer_well, *, seed: int = 0) -> Behaviour:
    """Do `then` with that chance, reproducibly."""
    chooser = random.Random(seed)
    return lambda exchange: then(exchange) if chooser.random() < chance else otherwise(exchange)


class Gate:
    """Hold requests until the test lets them go, from whichever thread."""

    def __init__(self) -> None:
        """Begin closed."""
        self._open = threading.Event()

    def open(self) -> None:
        """Let all requests pass, those that wait and those to come."""
        self._open.set()

    def close(self) -> None:
        """Hold requests again."""
        self._open.clear()

    def held(self, then: Behaviour = answer_well) -> Behaviour:
        """Wait for the gate, then do `then`."""

        async def act(exchange: Exchange) -> None:
            while not self._open.is_set():  # noqa: ASYNC110 - the event may be set on another thread
                await asyncio.sleep(0.002)
            await then(exchange)

        return act
