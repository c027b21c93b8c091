"""Who may come in, how much and how often: the functions that both doors call, and the middleware before everything else."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_network
from typing import Any

import anyio
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from multiverse_gateway.admin_key import key_digest
from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.errors import (
    ForeignForm,
    GatewayError,
    InvalidClientKey,
    InvalidJSON,
    LoopDetected,
    RequestTimeout,
    RequestTooLarge,
)
from multiverse_gateway.core.origins import OriginPolicy
from multiverse_gateway.entry.access import MAX_ADMIN_FAILURES, AccessRules
from multiverse_gateway.entry.asgi_types import Message, Receive
from multiverse_gateway.entry.error_responses import BadFraming
from multiverse_gateway.entry.framing import check_head, refuse_bad_framing, refuse_loop
from multiverse_gateway.entry.headers import cors_headers
from multiverse_gateway.entry.identity import (
    Headers,
    address_key,
    client_address,
    digests,
    is_forwarded,
    presented_keys,
    request_id,
    verified,
)
from multiverse_gateway.entry.request_bodies import ClientGone, body_deadline, read_body, read_object, run_draining
from multiverse_gateway.settings import Settings
from multiverse_gateway.web.error_middleware import Errors
from multiverse_gateway.web.middleware import Cors
from support.gateways import ADMIN_KEY, stage

SEALED = ("nosniff", "sandbox; default-src 'none'")
"""What keeps browsers from running anything in an answer of the API: content type options and content security policy."""

# Identity


@pytest.mark.parametrize("good", [b"a", b"A.b_c-9", b"x" * 64])
def test_a_callers_own_request_id_is_kept(good: bytes) -> None:
    assert request_id([(b"host", b"h"), (b"x-request-id", good)]) == good.decode()


@pytest.mark.parametrize("bad", [b"", b"x" * 65, b"a b", b"a\n", b"<script>", b"\xff"])
def test_an_unsafe_request_id_is_replaced(bad: bytes) -> None:
    found = request_id([(b"x-request-id", bad)])
    assert len(found) == 32
    assert found != request_id([])


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9%eth0", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("testclient", "unknown"),
        ("", "unknown"),
    ],
)
def test_addresses_are_counted_by_what_one_host_has(address: str, key: str) -> None:
    assert address_key(address) == key


TRUSTED = (ip_network("10.0.0.0/8"), ip_network("2001:db8:ff::/48"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("198.51.100.1", ["203.0.113.9"], "198.51.100.1"),  # nobody trusts this peer
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),  # what the client wrote stands left
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9, 10.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9"], "203.0.113.9"),  # two header lines are one list
        ("10.0.0.1", ["203.0.113.9, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["nonsense, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["10.1.1.1"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8:1:2:3::4"], "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("2001:db8:ff::1", ["203.0.113.9"], "203.0.113.9"),
        (None, ["203.0.113.9"], "unknown"),
    ],
)
def test_the_caller_is_the_last_hop_that_is_not_trusted(peer: str | None, forwarded: list[str], expected: str) -> None:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    assert client_address(peer, headers, TRUSTED) == expected
    assert client_address(peer, headers, ()) == address_key(peer or "")


@given(st.lists(st.binary(max_size=40), max_size=3), st.sampled_from(["10.0.0.1", "1.2.3.4", "x", None]))
def test_no_forwarded_header_does_harm(values: list[bytes], peer: str | None) -> None:
    assert client_address(peer, [(b"x-forwarded-for", value) for value in values], TRUSTED)


def test_keys_are_taken_from_either_header() -> None:
    headers = [(b"authorization", b"bEaReR  one "), (b"x-api-key", b"two"), (b"authorization", b"Basic three")]
    assert presented_keys(headers) == [b"one", b"two"]
    known = digests(["two", "other"])
    assert verified(headers, known) == key_digest("two")
    assert verified(headers, frozenset()) is None
    assert verified([(b"x-api-key", b"\xff\x00")], known) is None


# Framing


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"a"), (b"host", b"a")],
        [(b"content-length", b"1"), (b"content-length", b"1")],
        [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"transfer-encoding", b"xchunked")],
        [(b"content-length", b"+1")],
        [(b"content-length", b"1, 1")],
        [(b"content-length", b"")],
    ],
)
def test_a_request_that_could_be_two_is_refused(headers: Headers) -> None:
    assert isinstance(refuse_bad_framing(headers), BadFraming)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"a"), (b"content-length", b"12")],
        [(b"transfer-encoding", b" Chunked")],
        [(b"upgrade", b"h2c"), (b"http2-settings", b"AAMA")],
    ],
)
def test_an_honest_request_is_not(headers: Headers) -> None:
    assert refuse_bad_framing(headers) is None


def test_a_request_that_came_through_a_gateway_is_refused() -> None:
    assert isinstance(refuse_loop([(b"x-multiverse-hop", b"1")]), LoopDetected)
    assert refuse_loop([]) is None


# Keys


def test_only_a_verified_key_is_a_quota_of_its_own() -> None:
    """Any other key would be a way round the limit."""
    rules = AccessRules.of(Settings(client_api_keys=("a-good-client-key",)))
    peer = "192.0.2.1"
    found = key_digest("a-good-client-key").hex()
    for key, caller in (
        (b"invented", Caller(peer, max_at_once=256)),
        (b"a-good-client-key", Caller(found, f"setting:{found[:8]}", limit=600, max_at_once=64)),
    ):
        headers = [(b"authorization", b"Bearer " + key)]
        assert rules.caller("POST", peer, headers, dict(headers)) == caller


def test_the_head_of_a_request_is_checked_before_its_key() -> None:
    """A request that could be read in two ways, or comes from a form of another site, learns nothing about its key."""
    rules = AccessRules.of(Settings(client_api_keys=("a-good-client-key",), require_client_auth=True))

    def sender(*headers: tuple[bytes, bytes]) -> Caller:
        names = dict(headers)
        return rules.sender_of("POST", "192.0.2.1", list(headers), names, is_sound=False, is_forwarded=False)

    wrong, good = (b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer a-good-client-key")
    with pytest.raises(BadFraming):
        sender(wrong, (b"host", b"a"), (b"host", b"b"))
    with pytest.raises(ForeignForm):
        sender(wrong, (b"content-type", b"text/plain"), (b"origin", b"https://other.example"), (b"host", b"gateway"))
    with pytest.raises(InvalidClientKey):
        sender(wrong, (b"host", b"gateway"))
    assert sender(good, (b"host", b"gateway")).limit == 600


# Bodies


def arriving(*messages: Message) -> Receive:
    queue = list(messages)

    async def receive() -> Message:
        if queue:
            return queue.pop(0)
        await anyio.sleep_forever()
        raise AssertionError

    return receive


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


@given(st.lists(st.binary(max_size=20), max_size=8))
async def test_a_body_is_what_arrived(pieces: list[bytes]) -> None:
    whole = b"".join(pieces)
    receive = arriving(*(piece(part) for part in pieces), piece(b"", False))
    assert await read_body(receive, len(whole), 10.0) == whole


async def test_a_body_over_the_limit_is_refused_while_it_comes() -> None:
    with pytest.raises(RequestTooLarge):
        await read_body(arriving(piece(b"12345"), piece(b"6")), 5, 10.0)


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    with pytest.raises(RequestTooLarge):
        await read_body(arriving(), 5, 10.0, headers=[(b"content-length", b"6")])


async def test_a_body_that_stops_coming_times_out() -> None:
    with pytest.raises(RequestTimeout):
        await read_body(arriving(piece(b"1")), 5, 0.01)


async def test_a_slow_body_has_no_time_limit_in_all() -> None:
    left = 20

    async def receive() -> Message:
        nonlocal left
        await anyio.sleep(0.02)
        left -= 1
        return piece(b"x" * 1000, more=left > 0)

    assert len(await read_body(receive, 100_000, 0.1)) == 20_000


async def test_a_caller_who_leaves_ends_the_reading() -> None:
    with pytest.raises(ClientGone):
        await read_body(arriving(piece(b"1"), {"type": "http.disconnect"}), 5, 10.0)


def test_a_slow_body_gets_five_seconds_and_then_must_come_at_a_rate() -> None:
    """On average: one that was fast at first may be slow later, but never pause for too long."""
    assert body_deadline(0, 0.0, 30.0) == 5.0
    assert body_deadline(160 * 1024, 0.5, 30.0) == 15.0
    assert body_deadline(1 << 20, 2.0, 30.0) == 32.0
    assert body_deadline(4 << 20, 200.0, 30.0) == 230.0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"x"',
        b"\xff",
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b"[" * 200_000,
        b"{} {}",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJSON):
        read_object(body)


@given(st.binary(max_size=60))
def test_no_bytes_make_another_error(body: bytes) -> None:
    try:
        assert isinstance(read_object(body), dict)
    except InvalidJSON as error:
        error.body().decode()


# Draining


async def test_an_early_answer_does_not_wait_for_its_body() -> None:
    """A server below that sends nothing before the body was taken still gets to send (hypercorn does that)."""
    drained = anyio.Event()
    parts = [piece(b"x" * 1000) for _ in range(50)] + [piece(b"", False)]

    async def receive() -> Message:
        if len(parts) == 1:
            drained.set()
        if not parts:
            await anyio.sleep_forever()
        return parts.pop(0)

    sent: list[Message] = []

    async def send(message: Message) -> None:
        await drained.wait()
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": "/", "http_version": "1.1", "headers": [(b"content-length", b"50000")],
    }  # fmt: skip
    with anyio.fail_after(5):
        await run_draining(Response("no", 413), scope, receive, send, patience=5)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_an_error_leaves_the_draining_as_it_is() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("mine")

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "http_version": "2", "headers": []}
    with pytest.raises(RuntimeError, match="mine"):
        await run_draining(app, scope, arriving(), arriving_nowhere, patience=1)


async def failing_in_all_ways() -> None:
    """Refuse bodies and heads in each way, and let an application fail."""
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "http_version": "2", "headers": []}
    too_long = [(b"content-length", b"6")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive, 5, 10.0, headers=too_long)

    for messages, headers in (([], too_long), ([piece(b"123456")], []), ([{"type": "http.disconnect"}], [])):
        with suppress(GatewayError, ClientGone):
            await read_body(arriving(*messages), 5, 10.0, headers=headers)
    with suppress(GatewayError):
        await run_draining(app, scope, arriving(), arriving_nowhere, patience=1)
    with suppress(GatewayError):
        check_head([(b"host", b"a"), (b"host", b"b")], {b"host": b"a"})


async def test_a_refused_body_is_not_left_to_the_collector() -> None:
    """The error that refuses a body does not keep it, and all that was read of it, alive in a cycle."""
    await failing_in_all_ways()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await failing_in_all_ways()
        gc.collect()
        kept = [found for found in gc.garbage if isinstance(found, GatewayError | ClientGone)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert kept == []


async def arriving_nowhere(message: Message) -> None:
    raise AssertionError("nothing is sent")


# The middleware


async def test_the_admin_key_is_checked_before_anything_else() -> None:
    """TC-REG-003: whether a path, a method or a body is right is nothing for strangers."""
    async with stage() as at:
        for method, path in (("GET", "/admin"), ("POST", "/admin/nothing"), ("PATCH", "/admin/servers"), ("POST", "/admin/register")):
            for headers in ({"x-api-key": ""}, {"x-api-key": "wrong"}, {"x-api-key": "", "authorization": f"Basic {ADMIN_KEY}"}):
                response = await at.client.request(method, path, headers=headers, content=b"{")
                assert response.status_code == 403, (method, path)
                assert response.json()["error"]["code"] == "insufficient_permissions"
        ok = await at.client.get("/admin/servers", headers={"x-api-key": "", "authorization": f"Bearer {ADMIN_KEY}"})
        assert ok.status_code == 200


async def test_wrong_admin_keys_are_throttled_and_the_right_one_is_not() -> None:
    async with stage() as at:
        for _ in range(MAX_ADMIN_FAILURES):
            assert (await at.client.get("/admin/servers", headers={"x-api-key": "wrong"})).status_code == 403
        refused = await at.client.get("/admin/servers", headers={"x-api-key": "wrong"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert (await at.client.get("/admin/servers")).status_code == 200


async def test_the_api_is_limited_and_says_so() -> None:
    """NFR-SEC-004: every answer tells what is left; the refusal tells how long to wait. Operations are never limited."""
    async with stage(rate_limit_per_minute=2) as at:
        at.client.headers["via"] = "1.1 proxy"
        first = await at.client.get("/v1/files")
        assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
        assert first.headers["x-ratelimit-reset-requests"] == "1m0s"
        await at.client.get("/v1/files")
        refused = await at.client.get("/v1/files")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        for path in ("/health", "/admin/stats", "/v1/models"):
            assert (await at.client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("peer", "headers", "is_local"),
    [
        ("127.0.0.1", {}, True),
        ("127.8.9.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("192.0.2.1", {}, False),
        ("::ffff:192.0.2.1", {}, False),
        ("10.0.0.1", {}, False),
        ("", {}, False),
        (None, {}, False),
        ("127.0.0.1", {b"x-forwarded-for": b""}, False),
        ("::1", {b"forwarded": b"for=_hidden"}, False),
        ("127.0.0.1", {b"via": b"1.1 varnish"}, False),
        ("127.0.0.1", {b"cf-connecting-ip": b"127.0.0.1"}, False),
        ("127.0.0.1", {b"x-forwarded": b"1"}, True),
    ],
)
def test_a_client_of_this_machine_is_told_from_a_proxy(peer: str | None, headers: dict[bytes, bytes], is_local: bool) -> None:
    """By the other end of the connection and the headers that proxies and tunnels add."""
    assert AccessRules.of(Settings()).is_local(peer, is_forwarded(headers)) is is_local


@pytest.mark.parametrize(
    ("peer", "trusted", "remedy"),
    [
        ("127.0.0.1", (), "TRUSTED_PROXIES=127.0.0.1/32"),
        ("127.0.0.1", ("10.0.0.0/8",), "TRUSTED_PROXIES=127.0.0.1/32"),
        ("::1", (), "TRUSTED_PROXIES=::1/128"),
        ("127.0.0.1", ("127.0.0.1/32",), None),
        ("192.0.2.1", (), None),
    ],
)
def test_a_proxy_that_is_not_trusted_is_warned_of_once(
    peer: str, trusted: tuple[str, ...], remedy: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """If it is on this machine; from elsewhere anybody may send such headers."""
    rules = AccessRules.of(Settings(trusted_proxies=trusted))
    for _ in range(3):
        assert not rules.is_local(peer, True)
    assert rules.proxy.remedy == remedy
    assert len(caplog.records) == (remedy is not None)


async def test_client_keys_open_the_api_where_they_are_asked_for() -> None:
    async with stage(require_client_auth=True, client_api_keys=("a-good-client-key",)) as at:
        for headers in ({"x-api-key": ""}, {"authorization": "Bearer wrong"}, {"x-api-key": ADMIN_KEY}):
            refused = await at.client.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": "Bearer a-good-client-key"}, {"x-api-key": "a-good-client-key"}):
            assert (await at.client.get("/v1/models", headers=headers)).status_code == 200


async def test_every_answer_has_an_id_and_safe_headers() -> None:
    async with stage() as at:
        for path in ("/v1/models", "/admin/servers", "/health", "/nothing"):
            response = await at.client.get(path, headers={"x-request-id": "mine-1"})
            assert response.headers["x-request-id"] == "mine-1"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in response.headers["content-security-policy"]
        assert (await at.client.get("/v1/models")).headers["cache-control"] == "no-store"


async def test_bad_framing_ends_the_connection() -> None:
    async with stage() as at:
        response = await at.client.get("/health", headers={"transfer-encoding": "xchunked"})
        assert (response.status_code, response.headers["connection"]) == (400, "close")
        looped = await at.client.get("/v1/models", headers={"x-multiverse-hop": "1"})
        assert (looped.status_code, looped.json()["error"]["code"]) == (508, "loop_detected")


async def test_pages_of_other_origins_reach_the_api_only() -> None:
    async def hello(request: Request) -> Response:
        return JSONResponse({})

    routes = [Route("/v1/models", hello), Route("/admin/servers", hello)]
    policy = OriginPolicy.parse([], ["https://class.example"])
    app = Starlette(routes=routes, middleware=[Middleware(Errors), Middleware(Cors, policy=policy)])
    preflight = {
        "origin": "https://class.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        allowed = await client.options("/v1/chat/completions", headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://class.example")
        refused = await client.options("/v1/models", headers={**preflight, "origin": "https://evil.example"})
        assert refused.status_code == 400
        for answer in (allowed, refused):
            assert (answer.headers["x-content-type-options"], answer.headers["content-security-policy"]) == SEALED
        assert "access-control-allow-origin" not in (await client.get("/admin/servers", headers=preflight)).headers
        for origin in ("https://class.example", "https://other.example"):
            response = await client.get("/v1/models", headers={"origin": origin})
            expected = {name.decode(): value.decode() for name, value in cors_headers({b"origin": origin.encode()}, policy)}
            assert {name: value for name, value in response.headers.items() if "access-control" in name or name == "vary"} == expected


def test_the_direct_door_says_the_same_about_origins() -> None:
    def allowed(*origins: str, names: Mapping[bytes, bytes] = {b"origin": b"https://class.example"}) -> dict[bytes, bytes]:
        return dict(cors_headers(names, OriginPolicy.parse([], origins)))

    assert allowed("https://class.example")[b"access-control-allow-origin"] == b"https://class.example"
    assert allowed("*")[b"access-control-allow-origin"] == b"*"
    assert allowed() == allowed("https://other.example") == allowed("*", names={}) == {}


@pytest.mark.parametrize("can_answer", [True, False])
async def test_another_server_is_told_that_there_are_no_websockets(can_answer: bool) -> None:
    """A server that makes a scope of its own for WebSockets gets the usual 404, or the refusal that it understands."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    extensions: dict[str, Any] = {"websocket.http.response": {}} if can_answer else {}
    scope: dict[str, Any] = {"type": "websocket", "path": "/v1/responses", "headers": [], "extensions": extensions}
    async with stage() as at:
        await at.app(scope, arriving({"type": "websocket.connect"}), send)
    if can_answer:
        assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 404)
        assert b"unknown_url" in sent[1]["body"]
    else:
        assert sent == [{"type": "websocket.close"}]
