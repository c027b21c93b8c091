"""The body of a request on the direct door, told apart from what surrounds it: bytes in, pieces of the body out; no socket, no clock.

1. A `PlainBody` has a length. It takes so many bytes, however they are cut, and keeps what follows them as `rest`: the next request
   begins there.
2. A `ChunkedBody` is read by llhttp in its strict mode: the size of a chunk is hexadecimal digits without sign or prefix, lines end with
   CRLF, and chunk extensions and trailers must be well formed. They are read and dropped; a trailer is never taken for a header, and
   one that would have framed the body is an error (RFC 9112, 7.1.2). Nothing is buffered, so a line of any length costs no memory.
3. llhttp does not say where a chunked body ends in the bytes it was given. If anything but empty lines follows the body in the same
   bytes, `is_followed` is true: the request is good, but the connection cannot serve another one. `rest` stays empty.
4. A body is fed until it `is_whole`, and no further.
5. `received` counts what arrived for a body: its own bytes if it is plain, with sizes and line ends if it is chunked. It is what the
   time that a client may take is measured by.
"""

from typing import Final

import httptools

DROPPED_BYTES: Final = 64 << 20
"""Bytes of an unwanted body that are read and dropped, so that its client can read the response; then the connection ends."""


class MalformedBodyError(Exception):
    """The chunks of a body cannot be told apart, so neither can its end."""


class PlainBody:
    """A body of `length` bytes, of which `received` have arrived already; `is_followed` is never true: what follows it is in `rest`."""

    __slots__ = ("is_whole", "missing", "received", "rest")

    is_followed: Final = False

    def __init__(self, length: int, received: int = 0) -> None:
        self.received = received
        self.missing = missing = length - received
        """Bytes that have not arrived yet."""
        self.is_whole = not missing
        """Whether all of the body has arrived."""
        self.rest = b""
        """What arrived behind the body."""

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes of the connection, return the pieces of the body in them, in a new list."""
        missing = self.missing
        if len(data) > missing:
            data, self.rest = data[:missing], data[missing:]
        self.missing = missing = missing - len(data)
        self.is_whole = not missing
        self.received += len(data)
        return [data]

    def skip(self, data: bytes) -> None:
        """Take bytes of a body that is not wanted."""
        self.feed(data)

    def close(self) -> None:
        """Do nothing: only a chunked body holds anything."""


WHOLE_BODY: Final = PlainBody(0)
"""A plain body of which nothing is missing; it is shared, because nothing of it ever changes."""


class ChunkedBody:
    """A body in chunks; `head` is that of its request, without which llhttp reads no body."""

    __slots__ = ("_parser", "_pieces", "is_followed", "is_whole", "received")

    rest: Final = b""
    missing: Final = None
    """Return `None`: the length of a chunked body is not known in advance."""

    def __init__(self, head: bytes) -> None:
        self.is_whole = False
        """Whether the last chunk and the trailers have arrived."""
        self.is_followed = False
        """Whether something follows the body; where that begins is not known."""
        self.received = 0
        self._pieces: list[bytes] = []
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # llhttp reads no chunks behind the offer of an upgrade
            self.close()
            raise MalformedBodyError from None

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes of the connection, return the pieces of the body in them, in a new list.

        Raises:
            MalformedBodyError: They are not chunks.
        """
        assert self._parser is not None, "a body that is whole, malformed or skipped takes no more bytes"
        self._pieces = []
        self.received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.is_whole:
                self.close()
                raise MalformedBodyError from None
            self.is_followed = True
        if self.is_whole:
            self.close()
        return self._pieces

    def skip(self, data: bytes) -> None:
        """Count bytes of a body that is not wanted. It is not parsed any further, so its end is never found."""
        self.received += len(data)

    def close(self) -> None:
        """Drop the parser. It holds our methods, and the cycle would wait for the garbage collector."""
        self._parser = None

    # Called by llhttp

    def on_message_begin(self) -> None:
        """Note that a second request begins, which must wait."""
        self.is_followed = self.is_whole

    def on_body(self, data: bytes) -> None:
        """Take a piece, unless it belongs to a second request."""
        if not self.is_whole:
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note that the body is complete."""
        self.is_whole = True


def begin_chunked(data: bytes, end: int) -> tuple[ChunkedBody, list[bytes]] | None:
    """Begin a body in chunks behind a head that ends at `end`; return it and its first pieces.

    `None` if there is any doubt: what follows the head is not a chunk, or the body ends in `data` and something follows it.
    """
    try:
        body = ChunkedBody(data[:end])
        pieces = body.feed(data[end:])
    except MalformedBodyError:
        return None
    return None if body.is_followed else (body, pieces)
