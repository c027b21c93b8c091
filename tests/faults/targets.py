"""What the parsers promise, for any bytes at all: each target takes some and raises when a promise is broken.

`test_fuzz.py` feeds them what hypothesis thinks up, in every run; `fuzz.py` what a coverage-guided fuzzer does, for as long as one likes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import attrs
import httpx2

from multiverse_gateway.cli.hypercorn_hardening.http1 import _is_folded
from multiverse_gateway.core.addresses import AddressPolicy, Endpoint, EndpointError, parse_endpoint, refusal_of_any
from multiverse_gateway.core.answers import check_json, read_answer
from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import EnvelopeError
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.failover import Failure, FailureClass, classify, classify_report, parse_retry_after
from multiverse_gateway.core.payloads import MAX_REPORTED_TOKENS
from multiverse_gateway.core.reading import read_envelope
from multiverse_gateway.core.sse import EventStream
from multiverse_gateway.entry.framing import declared_length, refuse_bad_framing
from multiverse_gateway.entry.identity import client_address, presented_keys, request_id
from multiverse_gateway.entry.intake import check_target
from multiverse_gateway.relay.server_connection import MAX_HEAD_BYTES, ServerConnection, ServerPool, WireSending
from multiverse_gateway.relay.wire import Wire

LIMIT = 200
"""Longest event in these tests: the limit has to be met, too."""
FORM = 'multipart/form-data; boundary="x"'


def pieces_of(data: bytes, places: bytes) -> list[bytes]:
    """Cut data where the bytes of `places` say."""
    edges = sorted({0, len(data), *(place * (len(data) + 1) // 256 for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


def is_part_of(part: bytes, whole: bytes) -> bool:
    """Return whether nothing was added and the order is the same."""
    rest = iter(whole)
    return all(byte in rest for byte in part)


def sse(data: bytes) -> None:
    """However a stream is cut and paced: what leaves is what came less whole events, and never more than one event is held."""
    dialect, places, body = list(Dialect)[data[0] % 4] if data else Dialect.CHAT, data[1:5], data[5:]
    whole = EventStream(dialect, max_event_bytes=LIMIT, events_per_call=len(body) + 1)
    expected = whole.feed(body) + whole.finish()
    assert not whole.has_more
    assert is_part_of(expected, body)
    stream = EventStream(dialect, max_event_bytes=LIMIT, events_per_call=1 + (data[0] // 4 if data else 0))
    out = b""
    for piece in pieces_of(body, places):
        out += stream.feed(piece)
        while stream.has_more:
            waiting = len(stream._rest)
            out += stream.feed(b"")
            assert len(stream._rest) < waiting or not stream.has_more
        assert len(stream._rest) <= LIMIT
    out += stream.finish()
    assert is_part_of(out, body)
    assert stream.complete() in (True, False)
    assert not (stream.needs_done and stream.ended)
    if b"\r" not in body:
        assert (out, stream.ended, stream.failed, stream.complete()) == (expected, whole.ended, whole.failed, whole.complete())


def envelope(data: bytes) -> None:
    """A body is refused in one way only, and what is read of it is what the server will read."""
    path = "/v1/audio/transcriptions" if data[:1] == b"f" else "/v1/chat/completions"
    body = data[1:]
    try:
        read = read_envelope(path, FORM if data[:1] == b"f" else "application/json", body)
    except EnvelopeError:
        return
    assert read.model
    if data[:1] != b"f":
        fields = json.loads(body)
        assert (fields["model"], bool(fields.get("stream"))) == (read.model, read.stream)
        assert body.count(b'"model"') >= 1 or b"\\u" in body


def url(data: bytes) -> None:
    """A URL is refused in one way only; one that is taken has one form, which the HTTP library reads as we do."""
    text = data.decode("utf-8", "replace")
    try:
        endpoint = parse_endpoint(text)
    except EndpointError:
        return
    assert parse_endpoint(endpoint.url) == endpoint
    read = httpx2.URL(endpoint.url)
    assert (read.scheme, read.raw_host.decode().strip("[]")) == (endpoint.scheme, endpoint.host)
    assert (read.userinfo, read.query, read.fragment) == (b"", b"", "")
    assert (read.port or (443 if endpoint.tls else 80)) == endpoint.port
    assert endpoint.host.isascii()
    assert "\r" not in endpoint.authority + endpoint.prefix
    assert "\n" not in endpoint.authority + endpoint.prefix
    refused = refusal_of_any([endpoint.host], endpoint.port, AddressPolicy())
    assert refused is None or refused


def _fields(data: bytes) -> list[tuple[bytes, bytes]]:
    lines = [line.partition(b":") for line in data.split(b"\n")]
    return [(name.strip().lower(), value.strip()) for name, _, value in lines]


def head(data: bytes) -> None:
    """Whatever stands in a head: it is judged, never stumbled over, and nothing of it breaks a line of the head for a server."""
    fields = _fields(data)
    error = refuse_bad_framing(fields)
    assert error is None or isinstance(error, GatewayError)
    assert declared_length(fields) is None or error is not None or (declared_length(fields) or 0) >= 0
    assert request_id(fields).isprintable()
    assert all(isinstance(key, bytes) for key in presented_keys(fields))
    trusted = httpx2_networks()
    assert client_address("127.0.0.1", fields, trusted)
    assert client_address(data[:64].decode("latin-1"), fields, trusted)
    assert _is_folded(data) in (True, False)
    path, _, rest = data.partition(b" ")
    query, _, content_type = rest.partition(b" ")
    try:
        check_target(path.decode("latin-1"), query, content_type)
    except GatewayError:
        return
    assert not {b"\r", b"\n", b"\x00"} & {bytes([byte]) for byte in path + query + content_type}


def httpx2_networks() -> tuple[Any, ...]:
    """Return the proxies that are trusted here."""
    from ipaddress import ip_network

    return (ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8"))


def answer(data: bytes) -> None:
    """Whatever a server answers: it has a class, and what is relayed of it can stand in our own head."""
    status = 100 + int.from_bytes(data[:2], "big") % 500
    top, _, body = data[2:].partition(b"\n\n")
    headers: Mapping[bytes, bytes] = dict(_fields(top))
    for stream in (False, True):
        failure = classify(status, headers, None if 200 <= status < 300 else body, stream=stream, checks_json=True, now_wall=1e9)
        if failure is None:
            assert 200 <= status < 300
            continue
        assert isinstance(failure.kind, FailureClass)
        assert failure.reason.isprintable()
        assert not {13, 10, 0} & set(failure.content_type)
        assert failure.retry_after is None or failure.retry_after >= 0
    said = parse_retry_after(top, 1e9)
    assert said is None or said >= 0
    read = read_answer(body)
    assert (read is not None) is check_json(body)
    if read is not None:
        json.loads(body, parse_int=float)
        assert all(0 <= tokens <= MAX_REPORTED_TOKENS for tokens in read.tokens)
    reported = classify_report(body, headers, now_wall=1e9, request=top)
    assert reported.status is None or 400 <= reported.status < 600
    assert reported.reason.isprintable()


@attrs.define
class Transport:
    """The system's side of a connection that takes everything."""

    closed: bool = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def abort(self) -> None:
        """Close."""
        self.closed = True

    def get_write_buffer_size(self) -> int:
        """Have written everything."""
        return 0


@attrs.define
class Heard:
    """Note what a connection tells, and hold it to the order."""

    told: list[str] = attrs.field(factory=list)
    size: int = 0

    def head(self, status: int, headers: Mapping[bytes, bytes], /) -> None:
        """Receive a head: one at most, and a small one."""
        assert not self.told
        assert 200 <= status < 600
        assert sum(len(name) + len(value) for name, value in headers.items()) <= 2 * MAX_HEAD_BYTES
        self.told.append("head")

    def body(self, data: bytes, /) -> None:
        """Receive a piece, after the head and before the end."""
        assert self.told == ["head"]
        self.size += len(data)

    def end(self) -> None:
        """Receive the end, once."""
        assert self.told == ["head"]
        self.told.append("end")

    def failed(self, failure: Failure, /) -> None:
        """Receive a failure, once, and never one of ours."""
        assert self.told in ([], ["head"])
        assert failure.kind is not FailureClass.LOCAL, failure
        self.told.append("failed")


async def _answered(data: bytes, places: bytes) -> None:
    wire = Wire(policy=AddressPolicy, stale_timeout=0.0)
    heard = Heard()
    sending = WireSending(wire, ServerPool(Endpoint("http", "server.example", 80), keeps=True), [b"POST / HTTP/1.1\r\n\r\n"], heard)
    connection = ServerConnection(wire, sending)
    transport = Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces_of(data, places):
        if transport.closed:
            break
        if piece:
            connection.get_buffer(-1)[: len(piece)] = piece
            connection.buffer_updated(len(piece))
    if not transport.closed:
        connection.eof_received()
    connection.connection_lost(None)
    assert heard.told[-1:] in (["end"], ["failed"])
    assert heard.size <= len(data)


_LOOPS: list[asyncio.AbstractEventLoop] = []


def wire(data: bytes) -> None:
    """Whatever bytes a server sends, cut anywhere: one head at most, one ending, and no fault of ours."""
    if not _LOOPS:
        _LOOPS.append(asyncio.new_event_loop())
    _LOOPS[0].run_until_complete(_answered(data[4:60_000], data[:4]))


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "sse": sse,
    "envelope": envelope,
    "url": url,
    "head": head,
    "answer": answer,
    "wire": wire,
}


def seeds(name: str) -> Iterator[bytes]:
    """Return inputs to begin with: what is usual, and what was a fault once."""
    events = b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    json_answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    yield from {
        "sse": (
            b"\x00\x10\x20\x80\xa0" + events,
            b"\x00\xf0\xf8\xfc\xff" + events.replace(b"\n", b"\r\n"),
            b"\x01\x10\x20\x80\xa0event: response.completed\ndata: {}\n\n: ping\r\r",
            b"\x00\x10\x20\x80\xa0" + events[:62] + b'data:\n\n: x\n\nevent: error\ndata: {"object":"error","a":"\\ud83d","b":NaN}\n\n',
        ),
        "envelope": (
            b'j{"model": "tiny", "messages": [], "stream": true}',
            b'j{"model": "a", "model": "b"}',
            b'f--x\r\ncontent-disposition: form-data; name="model"\r\n\r\ntiny\r\n--x--\r\n',
        ),
        "url": (b"http://127.0.0.1:8000/v1", b"https://[2001:db8::1]:8443/a/v1", "http://b\u00fccher.example".encode(), b"http://0x7f.1"),
        "head": (
            b"host: x\ncontent-length: 7\ntransfer-encoding: chunked",
            b"/v1/chat/completions a=1 application/json",
            b"x-forwarded-for: 10.0.0.1, 2001:db8::1\nauthorization: Bearer k",
        ),
        "answer": (
            b"\x00\x64content-type: application/json\n\n{}",
            b"\x01\x49retry-after: Thu, 01 Jan 2026 00:00:00 GMT\n\n" + b'{"error": {"code": "model_not_found"}}',
            b"\x01\x30ngrok-error-code: ERR_NGROK_3200\n\n<html>",
            b'\x00\x64x: y\n\n\xef\xbb\xbf{"error": {"code": "404"}, "usage": {"prompt_tokens": -Infinity}, "data": ["\\ud83d"]}',
        ),
        "wire": (
            b"\x10\x20\x80\xa0" + json_answer + b"content-length: 2\r\n\r\n{}",
            b"\x10\x20\x80\xa0" + json_answer + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: y\r\n\r\n",
            b"\x10\x20\x80\xa0HTTP/1.1 100 Continue\r\n\r\n" * 2 + json_answer + b"\r\n{}",
        ),
    }[name]
