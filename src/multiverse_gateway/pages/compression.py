"""Compress pages where that gives no secret away.

The length of a compressed page says whether it holds the same text twice: a secret, and a guess that somebody else put into the request
(BREACH). So a page is compressed only if all of this holds:

1. It was asked for by a page of ours, by a person or by a program: a request that another site caused is not compressed.
2. It shows no key or token. The token of the session that each page carries has another mask in each response (`pages.masking`).
3. It is a whole page or a part of one. Streams of events and all answers of the API are never compressed here.
"""

import gzip
import re
from collections.abc import Mapping

import anyio.to_thread
from starlette.datastructures import MutableHeaders
from starlette.responses import HTMLResponse, Response

from multiverse_gateway.core.encodings import accepts_gzip

LEVEL = 5
SMALLEST = 1000
"""Bytes; a shorter page fits into one packet as it is."""
LARGE = 100_000
"""Bytes from which on compressing takes so long (3 ms) that another thread does it."""
_SECRET = re.compile(rb"mvg-[a-z]+-[\w-]{30,}")
"""A key or token of ours in full; no page shows one but the one that hands it out."""
_VARY = "Accept-Encoding"


def may_compress(headers: Mapping[str, str], content: bytes) -> bool:
    """Return whether a page may be compressed for the request with these headers."""
    is_ours = headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    wants = accepts_gzip(headers.get("accept-encoding", ""))
    return is_ours and wants and len(content) >= SMALLEST and _SECRET.search(content) is None


async def compressed(response: Response, headers: Mapping[str, str]) -> Response:
    """Return a page as it is sent in response to the request with these headers; other responses are returned unchanged."""
    if not isinstance(response, HTMLResponse):
        return response
    found = MutableHeaders(raw=response.raw_headers)
    found["vary"] = f"{found['vary']}, {_VARY}" if "vary" in found else _VARY
    content = bytes(response.body)
    if may_compress(headers, content):
        packed = await anyio.to_thread.run_sync(_packed, content) if len(content) >= LARGE else _packed(content)
        response.body = packed
        found["content-encoding"] = "gzip"
        found["content-length"] = str(len(packed))
    return response


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, LEVEL, mtime=0)
