"""What is written to a server: the head's prefix is kept, the body carries what the server has to see."""

from __future__ import annotations

import json

import attrs
import pytest
from attrs import evolve

from multiverse_gateway.core.reading import read_envelope
from multiverse_gateway.core.servers import Server
from multiverse_gateway.relay.heads import HeadFacts
from multiverse_gateway.relay.ports import ClientRequest
from multiverse_gateway.relay.requests import COPIED_BYTES, MAX_PREFIXES, Requests
from multiverse_gateway.testing.store import make_server
from support.exchanges import sent_by

JSON = b"application/json"


def chat(fields: dict[str, object] | None = None, *, padding: int = 0) -> ClientRequest:
    """Return a chat request with such further fields."""
    body = json.dumps({"model": "tiny", "messages": [], "user": "x" * padding, **(fields or {})}).encode()
    envelope = read_envelope("/v1/chat/completions", "application/json", body)
    return sent_by("someone", envelope, 0.0, body=body)


def sent(requests: Requests, server: Server, request: ClientRequest, *, usage_refused_by: Server | None = None) -> tuple[bytes, bytes]:
    """Write a request as an attempt does; return its head and its body."""
    asks_usage = request.envelope.leaves_usage and requests.may_ask_usage(server, usage_refused_by)
    _, parts = requests.write(server, request, asks_usage=asks_usage)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    assert asks_usage is (b'"include_usage":true' in body.replace(b" ", b""))
    return head, body


def asks(requests: Requests, server: Server, request: ClientRequest) -> bool:
    """Return whether the request asks for token counts."""
    return b"include_usage" in sent(requests, server, request)[1]


def test_the_head_names_server_path_request_and_length() -> None:
    server = make_server("s", endpoint_url="http://192.0.2.7:8000/api", api_key="secret", model_name="tiny")
    request = evolve(chat(), facts=HeadFacts(query=b"api-version=1", forwarded=b"openai-beta: a\r\n"))
    head, body = sent(Requests(), server, request)
    lines = head.split(b"\r\n")
    assert lines[:2] == [b"POST /api/v1/chat/completions?api-version=1 HTTP/1.1", b"host: 192.0.2.7:8000"]
    assert {b"authorization: Bearer secret", b"openai-beta: a", b"x-request-id: request-1", b"content-length: %d" % len(body)} <= {*lines}


def test_prefixes_differ_by_the_headers_that_are_forwarded() -> None:
    """One client's betas are not another one's."""
    server, requests = make_server("s"), Requests()
    plain, beta = (requests.target(server, "/v1/x", b"", b"a/b", False, lines)[1] for lines in (b"", b"openai-beta: a\r\n"))
    assert beta == plain.replace(b"x-request-id: ", b"openai-beta: a\r\nx-request-id: ")
    assert requests.target(server, "/v1/x", b"", b"a/b", False)[1] is plain


@pytest.mark.parametrize(("query", "is_kept"), [(b"api-version=1", True), (b"a" * 4096, False)])
def test_only_short_prefixes_are_kept(query: bytes, is_kept: bool) -> None:
    """A thousand of the longest that clients may choose would take tens of megabytes."""
    requests = Requests()
    one, other = (requests.target(make_server("s"), "/v1/x", query, JSON, False) for _ in range(2))
    assert one == other
    assert (one is other) is is_kept


def test_a_bounded_number_of_prefixes_is_kept() -> None:
    server, requests = make_server("s"), Requests()
    first = requests.target(server, "/v1/x", b"", JSON, False)
    for number in range(MAX_PREFIXES):
        requests.target(server, "/v1/x", b"%d" % number, JSON, False)
    assert requests.target(server, "/v1/x", b"", JSON, False) is not first


@pytest.mark.parametrize(("padding", "parts"), [(0, 1), (COPIED_BYTES, 2)])
def test_a_large_body_is_not_copied(padding: int, parts: int) -> None:
    _, request = Requests().write(make_server("s", model_name="tiny"), chat(padding=padding))
    assert len(request) == parts


def test_the_server_gets_its_own_name_of_the_model() -> None:
    for named, asked in (({}, "Tiny"), ({"upstream_model": "org/Tiny 1 (q4)"}, "org/Tiny 1 (q4)")):
        _, body = sent(Requests(), make_server("s", **{"model_name": "Tiny", "upstream_model": None, **named}), chat())
        assert json.loads(body)["model"] == asked


def test_a_stream_is_asked_for_its_tokens_unless_the_server_refused() -> None:
    server, requests = make_server("s", model_name="tiny"), Requests()
    request = chat({"stream": True})
    assert asks(requests, server, request)
    requests.usage_refused(server)
    assert not asks(requests, server, request)
    changed = attrs.evolve(server, generation=server.generation + 1)
    requests.follow([changed])
    assert not requests.refuses_usage(server)
    assert asks(requests, changed, request)


@pytest.mark.parametrize("why", ["setting", "another server refused", "the client decides"])
def test_a_stream_is_not_asked_for_its_tokens(why: str) -> None:
    server = make_server("s", model_name="tiny")
    fields: dict[str, object] = {"stream": True}
    if why == "the client decides":
        fields["stream_options"] = {"include_usage": False}
    usage_refused_by = make_server("other") if why == "another server refused" else None
    _, body = sent(Requests(count_stream_tokens=why != "setting"), server, chat(fields), usage_refused_by=usage_refused_by)
    assert json.loads(body).get("stream_options") == fields.get("stream_options")


def test_what_was_accepted_is_remembered_for_one_generation() -> None:
    server, requests = make_server("s"), Requests()
    requests.usage_accepted(server)
    changed = attrs.evolve(server, generation=server.generation + 1)
    assert (requests.accepts_usage(server), requests.accepts_usage(changed)) == (True, False)
    requests.follow([])
    assert not requests.accepts_usage(server)


def test_an_address_of_an_older_release_that_is_refused_today_is_never_dialed() -> None:
    endpoint, _ = Requests().write(make_server("s", endpoint_url="ftp://192.0.2.7"), chat())
    assert endpoint.authority == "0.0.0.0"
