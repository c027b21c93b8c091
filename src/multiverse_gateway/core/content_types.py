"""The content type under which a server's answer is relayed.

Anybody may register a server, and its answers come from the gateway's own origin. A browser must never take one of them for a document:
its script would run with the session of its reader. So a content type is relayed only if it is on a list of harmless ones. The
list names what is allowed instead of what is forbidden, because browsers render more types than anyone remembers (SVG, XHTML, every
`+xml`, MHTML, PDF, `multipart/x-mixed-replace`).
"""

import re
from functools import lru_cache

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
BINARY = b"application/octet-stream"

_ALLOWED = frozenset(
    {
        JSON,
        b"application/x-ndjson",
        b"text/event-stream",
        b"text/plain",
        BINARY,
        b"image/png",
        b"image/jpeg",
        b"image/webp",
        b"image/gif",
        b"video/mp4",
        b"video/webm",
    }
)
_MARKUP = re.compile(rb"(?:^|[^0-9a-z])(?:xml|x?html)(?:$|[^0-9a-z])|\+xml")
_MAX_LENGTH = 256
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TYPE = re.compile(rb"(%b)/(%b)" % (_TOKEN, _TOKEN))
_PARAMETERS = re.compile(rb'(?:[ \t]*;[ \t]*%b=(?:%b|"(?:[ !#-\[\]-~]|\\[ -~])*"))*' % (_TOKEN, _TOKEN))


@lru_cache(maxsize=256)
def relayed_type(value: bytes | None, is_json: bool) -> bytes:
    """Return the content type to relay for the one that a server sent, whatever the status of its answer.

    `value` is the header as it came, `None` if there was none. `is_json` says whether the path answers with JSON, which then is what an
    answer without a content type is taken for. Parameters are kept if they are tokens or quoted strings, and dropped otherwise. Called
    once per answer; a server sends few different values, so most calls are a look-up (which keyword arguments would make twice as slow).

    >>> relayed_type(b"audio/mpeg", False), relayed_type(b"image/svg+xml", False)
    (b'audio/mpeg', b'text/plain; charset=utf-8')
    >>> relayed_type(b"application/problem+json", True), relayed_type(b"application/pdf", False)
    (b'application/json', b'application/octet-stream')
    >>> relayed_type(None, True), relayed_type(None, False)
    (b'application/json', b'application/octet-stream')
    """
    value = b"" if value is None else value.strip(b" \t")
    if not value:
        return JSON if is_json else BINARY
    essence, separator, parameters = value.partition(b";")
    media = essence.rstrip(b" \t").lower()
    parts = _TYPE.fullmatch(media)
    if parts is None:
        return BINARY
    kind, subtype = parts.groups()
    if subtype.endswith(b"+json"):
        return JSON
    if media not in _ALLOWED and (kind != b"audio" or _is_markup(subtype)):
        return TEXT if kind == b"text" or _is_markup(subtype) else BINARY
    parameters = separator + parameters
    return media + parameters if len(value) <= _MAX_LENGTH and _PARAMETERS.fullmatch(parameters) else media


def _is_markup(subtype: bytes) -> bool:
    """Return whether a browser could read a subtype as HTML or XML: it does so with every `+xml`, even for audio or images."""
    return _MARKUP.search(subtype) is not None


def is_identity(coding: bytes | None) -> bool:
    """Return whether an answer with this `Content-Encoding` header, or without one, is not compressed; the gateway reads no other answer.

    >>> is_identity(None), is_identity(b" Identity"), is_identity(b"gzip")
    (True, True, False)
    """
    return coding is None or coding.strip().lower() in (b"", b"identity")
