"""Heads of requests in HTTP/1.1, read by llhttp once.

A client sends the same head again and again; only the number of its `Content-Length` differs. So a head that was read is remembered, and
stands for every head with the same bytes around that number. Looking one up costs 0.5 µs, reading it 3 µs, and what the rules found out
about a head (`HeadFacts`) need not be found out again.

1. A head is read if its first line begins with `POST ` and ends with ` HTTP/1.1`, llhttp finds nothing wrong in its strict mode, its path
   is that of an API call, in ASCII and without percent-encoding, it has a host, and a length of at most `MAX_DIGITS` digits or none. What
   its headers mean together is judged by the rules for incoming requests.
2. A remembered head is found by all its bytes except the digits of its length, so nothing about it is guessed.
3. It is remembered only if the place of those digits is certain: they follow the first `ength: ` of the head, before which the rest of the
   name stands at the beginning of a line; no line of the head is folded; and llhttp refuses a head with two lengths.
4. At most `MAX_KNOWN` heads of at most `MAX_KNOWN_BYTES` are remembered. When there is no more room, all are forgotten: clients choose what
   stands in heads, and keeping the order of use would cost every request something.
"""

from typing import Final

import attrs
import httptools

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.paths import api_path, below, is_api, without_origin

Headers = list[tuple[bytes, bytes]]

MAX_KNOWN: Final = 512
"""How many heads are remembered."""
MAX_KNOWN_BYTES: Final = 2048
"""Longer heads are not remembered."""
MAX_DIGITS: Final = 18

_JSON: Final = b"application/json"
_LENGTH: Final = b"ength: "
_FIELD: Final = b"\r\ncontent-length: "


@attrs.frozen(eq=False)
class HeadFacts:
    """Facts about a head that depend on neither its sender nor the time: the rules for incoming requests compute them once.

    Without arguments they are those of a plain JSON request.
    """

    is_sound: bool = True
    """Whether it can be read in one way only, came through no gateway before, and from no form of another site."""
    is_call: bool = True
    """Whether its path can be that of a call by POST."""
    is_callable: bool = True
    """Whether it can be sent on to a server."""
    request_id: str | None = None
    """The client's own, if it is a safe one."""
    headers: Headers = attrs.field(factory=list)
    """What every answer gets for it: what keeps browsers from running it, and leave to other origins."""
    is_anthropic: bool = False
    """Whether the call belongs to Anthropic's API, whose answers carry the id in a header of their own."""
    lines: bytes = b""
    """The same as HTTP/1.1 writes it."""
    query: bytes = b""
    content_type: bytes = _JSON
    media: str = "application/json"
    """The content type as text."""
    sent_type: bytes = _JSON
    """The content type that a server gets: of a form its own, else JSON, as which the gateway reads every other body."""
    traceparent: str | None = None
    """The client's trace (W3C Trace Context)."""
    forwarded: bytes = b""
    """The lines that it adds to the head of the request to a server (`core.forwarding`)."""
    is_forwarded: bool = False
    """Whether a proxy or a tunnel has passed it on."""
    explains: bool = False
    """Whether it asks why a server was chosen."""
    is_bulk: bool = False
    """Whether no person waits for its answer, so that it yields to other requests."""
    wants_comments: bool = False
    """Whether a stream gets comments while it waits."""
    lookup: Envelope | None = None
    """The envelope of a call for what is stored, which says all that its body would."""


@attrs.define(eq=False)
class RequestHead:
    """The head of a request: names in lower case, `path` decoded and spelled as rules expect it (`core.paths`).

    One object stands for many requests. The number of `content-length` in `fields` may therefore be that of another request, and `facts`
    hold for all of them; they are `None` until the rules for incoming requests have read the head.
    """

    method: str
    path: str
    query: bytes
    fields: Headers
    keeps: bool = True
    """Whether the connection may serve another request."""
    names: dict[bytes, bytes] = attrs.field(init=False)
    """The fields as a dictionary; of a name that comes twice it has the first value."""
    facts: HeadFacts | None = attrs.field(default=None, init=False)

    @names.default
    def _first_of_each(self) -> dict[bytes, bytes]:
        return dict(reversed(self.fields))


class Heads:
    """The reader of heads, which remembers them; `root` is the path below which a proxy serves the gateway."""

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._known: dict[bytes, RequestHead] = {}

    def read(self, data: bytes, end: int) -> tuple[RequestHead, int | None] | None:
        """Read the head before `end`; return it and the length of the body, which is `None` for one in chunks.

        `None` for all of it if it is no `POST` to the API in HTTP/1.1 with a host, is in doubt or asks for an upgrade.
        """
        at = data.find(_LENGTH, 0, end) + 7
        if at == 6:  # `find` returned -1: there is no length
            key, number = data[:end], b"0"
        else:
            stop = data.find(b"\r\n", at, end)
            key, number = data[:at] + data[stop:end], data[at:stop]
        head = self._known.get(key)
        if head is not None and number.isdigit() and len(number) <= MAX_DIGITS:
            return head, int(number)
        head = _read(data[:end], self._root)
        if head is None:
            return None
        if b"transfer-encoding" in head.names:
            return head, None
        has_length = b"content-length" in head.names  # a length that `find` missed is part of the key
        if len(key) <= MAX_KNOWN_BYTES and (_is_field(key, at) if has_length else at == 6):
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = head
        length = head.names.get(b"content-length", b"0")
        return head, int(length)


def _is_field(key: bytes, at: int) -> bool:
    """Return whether the name of the length ends at `at`, at the beginning of a line, in a head without folded lines."""
    begins = at - len(_FIELD)
    return begins > 0 and key[begins:at].lower() == _FIELD and b"\r\n " not in key and b"\r\n\t" not in key


class _Parser:
    """Keep what llhttp reads."""

    def __init__(self) -> None:
        self.url = b""
        self.fields: Headers = []
        self.keeps: bool | None = None
        self.parser = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        self.keeps = self.parser.should_keep_alive()


def _read(head: bytes, root: str) -> RequestHead | None:
    line = head[: head.find(b"\r\n")]
    if not (line.startswith(b"POST ") and line.endswith(b" HTTP/1.1")):
        return None
    read = _Parser()
    try:
        read.parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # only an offer (RFC 9110, 7.8), which the JDK's client makes with every request; the head is whole
    except httptools.HttpParserError:
        return None
    finally:
        del read.parser  # which holds its methods: no cycle is left for the collector
    path, _, query = read.url.partition(b"?")
    if read.keeps is None or b"%" in path or not path.isascii():
        return None
    called = api_path("POST", below(without_origin(path.decode("ascii")), root))
    if not is_api(called):
        return None
    request_head = RequestHead("POST", called, query, read.fields, read.keeps)
    length = request_head.names.get(b"content-length", b"0")
    return request_head if b"host" in request_head.names and length.isdigit() and len(length) <= MAX_DIGITS else None
