"""The requests that go to servers: the bytes of a client's request, written for the server that is tried.

The head up to the value of `x-request-id` is the same for nearly every request of a client to a server, so it is kept: writing it costs
about 6 µs of some 45 for a whole request, looking it up less than 1. When there is no more room, all heads are forgotten, because keeping
the order of use would cost every request something.
"""

from collections.abc import Collection

from multiverse_gateway._version import __version__
from multiverse_gateway.core.addresses import Endpoint, EndpointError, parse_endpoint, with_opening
from multiverse_gateway.core.rewriting import asking_for_usage, with_model
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.relay.ports import ClientRequest

COPIED_BYTES = 16384
"""Up to this size a body is copied behind its head: one buffer is written for less than two."""
MAX_PREFIXES = 1024
"""Prefixes of heads that are kept: clients choose path, query, content type and the headers that are forwarded."""
MAX_PREFIX_BYTES = 2048
"""Longer ones are not kept."""
USER_AGENT = f"multiverse-gateway/{__version__}"

_Target = tuple[Endpoint, bytes]
"""Where a request goes, and its head up to the value of `x-request-id`."""


class Requests:
    """Write requests, and remember which servers can be asked for the token counts of a stream (`stream_options`)."""

    def __init__(self, *, count_stream_tokens: bool = True) -> None:
        self._counts_tokens = count_stream_tokens
        self._targets: dict[tuple[ServerId, int, str, bytes, bytes, bool, bytes], _Target] = {}
        self._accept_usage: set[tuple[ServerId, int]] = set()
        self._refuse_usage: set[tuple[ServerId, int]] = set()

    def write(self, server: Server, request: ClientRequest, *, asks_usage: bool = False) -> tuple[Endpoint, tuple[bytes, ...]]:
        """Return where a request goes and what is sent; with `asks_usage` it also asks for the token counts of a stream."""
        envelope = request.envelope
        if envelope.is_lookup:
            return self._lookup(server, request)
        head = request.facts
        key = server.id, server.generation, envelope.path, head.query, head.sent_type, envelope.stream, head.forwarded
        endpoint, prefix = self._targets.get(key) or self.target(server, *key[2:])
        body = request.body
        model = server.upstream_model or server.model_name
        if model != envelope.written_model:
            body = with_model(body, head.sent_type.decode("latin-1"), model)
        if asks_usage:
            body = asking_for_usage(body)
        written = b"%b%b\r\ncontent-length: %d\r\n\r\n" % (prefix, request.request_id.encode(), len(body))
        return endpoint, ((written + body,) if len(body) <= COPIED_BYTES else (written, body))

    def _lookup(self, server: Server, request: ClientRequest) -> tuple[Endpoint, tuple[bytes, ...]]:
        """Write a request for a stored response: its head is made for this request alone, and only a POST has a body."""
        envelope, head, endpoint, method = request.envelope, request.facts, endpoint_of(server), request.envelope.method
        prefix = _head_prefix(server, endpoint, envelope.path, head.query, head.sent_type, envelope.stream, head.forwarded, method)
        body = request.body if method == "POST" else b""
        length = b"content-length: %d\r\n" % len(body) if method == "POST" else b""
        return endpoint, (b"%b%b\r\n%b\r\n%b" % (prefix, request.request_id.encode(), length, body),)

    def target(self, server: Server, path: str, query: bytes, content_type: bytes, stream: bool, forwarded: bytes = b"") -> _Target:
        """Return where a request goes, and its head up to the value of `x-request-id`."""
        key = (server.id, server.generation, path, query, content_type, stream, forwarded)
        target = self._targets.get(key)
        if target is None:
            endpoint = endpoint_of(server)
            target = endpoint, _head_prefix(server, endpoint, path, query, content_type, stream, forwarded)
            if len(target[1]) <= MAX_PREFIX_BYTES:
                if len(self._targets) >= MAX_PREFIXES:
                    self._targets.clear()
                self._targets[key] = target
        return target

    def may_ask_usage(self, server: Server, usage_refused_by: Server | None = None) -> bool:
        """Return whether a server may be asked for the token counts of a stream whose client does not set `stream_options`.

        `usage_refused_by` is the server that rejected the question for the same request, or `None`; after a rejection no server is asked.
        """
        return self._counts_tokens and usage_refused_by is None and (server.id, server.generation) not in self._refuse_usage

    def usage_accepted(self, server: Server) -> None:
        """Remember that this generation of a server answered a stream whose tokens it was asked for."""
        self._accept_usage.add((server.id, server.generation))

    def accepts_usage(self, server: Server) -> bool:
        """Return whether this generation of a server has answered such a stream before."""
        return (server.id, server.generation) in self._accept_usage

    def usage_refused(self, server: Server) -> None:
        """Stop asking this generation of a server for the tokens of a stream: it refuses, or it sends more than token counts."""
        self._refuse_usage.add((server.id, server.generation))

    def refuses_usage(self, server: Server) -> bool:
        """Return whether this generation of a server is not asked any more."""
        return (server.id, server.generation) in self._refuse_usage

    def follow(self, servers: Collection[Server]) -> None:
        """Forget what is known of servers that are gone or have changed; these are the ones that there are."""
        self._targets.clear()
        generations = {(server.id, server.generation) for server in servers}
        self._refuse_usage &= generations
        self._accept_usage &= generations


def endpoint_of(server: Server) -> Endpoint:
    """Read a server's URL; one that an older version accepted and this one does not becomes an address that is never dialed."""
    try:
        return with_opening(parse_endpoint(server.endpoint_url), server.opened_address)
    except EndpointError:
        return Endpoint("http", "0.0.0.0", 80)  # noqa: S104  to be refused, not bound


def _head_prefix(
    server: Server,
    endpoint: Endpoint,
    path: str,
    query: bytes,
    content_type: bytes,
    stream: bool,
    forwarded: bytes,
    method: str = "POST",
) -> bytes:
    lines = [
        b"%b %b%b HTTP/1.1" % (method.encode(), f"{endpoint.prefix}{path}".encode(), b"?" + query if query else b""),
        b"host: " + endpoint.authority.encode(),
        b"user-agent: " + USER_AGENT.encode(),
        b"accept-encoding: identity",
        b"ngrok-skip-browser-warning: 1",
        b"x-multiverse-hop: 1",
        *([b"content-type: " + (content_type or b"application/json")] if method == "POST" else []),
        b"accept: text/event-stream" if stream else b"accept: */*",
    ]
    if server.api_key is not None:
        lines.append(f"authorization: Bearer {server.api_key}".encode())
    return b"\r\n".join([*lines, forwarded + b"x-request-id: "])
