"""What a server's content type becomes before a browser sees it."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from multiverse_gateway.core.content_types import BINARY, JSON, TEXT, relayed_type

ALLOWED = re.compile(
    rb"(application/(json|x-ndjson|octet-stream)|text/(event-stream|plain)|audio/(?![^;]*\+xml)[!-:<-~]+|image/(png|jpeg|webp|gif)|"
    rb"video/(mp4|webm))(;[ -~\t]*)?"
)


@pytest.mark.parametrize(
    "value",
    [
        b"application/json",
        b"application/json; charset=utf-8",
        b"application/json;charset=UTF-8",
        b"application/x-ndjson",
        b"text/event-stream",
        b"text/event-stream; charset=utf-8",
        b"text/plain",
        b"text/plain; charset=iso-8859-1",
        b"application/octet-stream",
        b"audio/mpeg",
        b"audio/wav",
        b"audio/x-wav",
        b"audio/L16; rate=24000; channels=1".lower(),
        b'audio/ogg; codecs="opus, vorbis"',
        b'audio/ogg; codecs="a \\" b"',
        b"image/png",
        b"image/jpeg",
        b"image/webp",
        b"image/gif",
        b"video/mp4",
        b"video/webm",
    ],
)
def test_harmless_types_are_relayed_unchanged(value: bytes) -> None:
    """They keep plain parameters, too, on every path."""
    assert relayed_type(value, False) == value
    assert relayed_type(value, True) == value


@pytest.mark.parametrize(
    ("value", "relayed"),
    [
        (b"application/problem+json", JSON),
        (b"application/vnd.api+json; charset=utf-8", JSON),
        (b"image/svg+json", JSON),
        (b"text/html", TEXT),
        (b"text/html; charset=utf-7", TEXT),
        (b"TEXT/HTML", TEXT),
        (b"  text/html", TEXT),
        (b"\ttext/html", TEXT),
        (b"text/html ;charset=x", TEXT),
        (b"text/html;", TEXT),
        (b"text/xml", TEXT),
        (b"application/xml", TEXT),
        (b"application/xml-dtd", TEXT),
        (b"application/xhtml+xml", TEXT),
        (b"image/svg+xml", TEXT),
        (b"image/SVG+XML", TEXT),
        (b"audio/anything+xml", TEXT),
        (b"audio/xml", TEXT),
        (b"audio/html", TEXT),
        (b"video/x+xml", TEXT),
        (b"application/rss+xml", TEXT),
        (b"multipart/x+xml", TEXT),
        (b"text/javascript", TEXT),
        (b"text/css", TEXT),
        (b"text/markdown", TEXT),
        (b"text/vtt", TEXT),
        (b"application/javascript", BINARY),
        (b"application/pdf", BINARY),
        (b"application/x-shockwave-flash", BINARY),
        (b"application/wasm", BINARY),
        (b"application/vnd.openxmlformats-officedocument.wordprocessingml.document", BINARY),
        (b"multipart/related", BINARY),
        (b"multipart/x-mixed-replace; boundary=x", BINARY),
        (b"message/rfc822", BINARY),
        (b"image/avif", BINARY),
        (b"video/quicktime", BINARY),
        (b"font/woff2", BINARY),
        (b"*/*", BINARY),
        (b"html", BINARY),
        (b"text", BINARY),
        (b"text/", BINARY),
        (b"/html", BINARY),
        (b"text/plain, text/html", BINARY),
        (b"application/json, text/html", BINARY),
        (b"text /html", BINARY),
        (b"<text/html>", BINARY),
        (b"text/html\x00", BINARY),
        (b"\xa0text/html", BINARY),
        (b"audio/\xff", BINARY),
        (b"\x0btext/html", BINARY),
    ],
)
def test_every_other_type_becomes_one_that_no_browser_renders(value: bytes, relayed: bytes) -> None:
    """Markup and text become plain text; what cannot be read, or is none of them, becomes bytes to save."""
    assert relayed_type(value, False) == relayed
    assert relayed_type(value, True) == relayed


@pytest.mark.parametrize(
    ("value", "relayed"),
    [
        (b"application/json;", b"application/json"),
        (b"Application/JSON; charset=utf-8", b"application/json; charset=utf-8"),
        (b"text/plain; charset", b"text/plain"),
        (b"text/plain; charset=", b"text/plain"),
        (b"text/plain; charset=utf-8; <script>", b"text/plain"),
        (b"text/plain; charset=utf-8, text/html", b"text/plain"),
        (b"audio/mpeg; x=\xff", b"audio/mpeg"),
        (b'audio/mpeg; x="', b"audio/mpeg"),
        (b'audio/mpeg; x="\\', b"audio/mpeg"),
        (b'audio/mpeg; x="a" b', b"audio/mpeg"),
        (b"audio/mpeg; x=" + b"a" * 250, b"audio/mpeg"),
        (b"text/event-stream;charset=utf-8\r\nset-cookie: a=b", b"text/event-stream"),
    ],
)
def test_parameters_that_are_not_plain_are_dropped(value: bytes, relayed: bytes) -> None:
    """The type itself is harmless, so it stays."""
    assert relayed_type(value, False) == relayed


@pytest.mark.parametrize("value", [None, b"", b" ", b"\t"])
def test_an_answer_without_a_type_is_what_its_path_answers_with(value: bytes | None) -> None:
    """JSON where the API answers with JSON, bytes where it may be anything."""
    assert relayed_type(value, True) == JSON
    assert relayed_type(value, False) == BINARY


KINDS = st.sampled_from([b"text", b"image", b"audio", b"video", b"application", b"multipart", b"message", b"*", b""])
SUBTYPES = st.sampled_from([b"html", b"xhtml+xml", b"svg+xml", b"xml", b"plain", b"json", b"x+json", b"mpeg", b"png", b"pdf", b"mp4"])


@example(b"audio/+xml*", False)
@example(b"audio/+xml0", False)
@given(
    st.binary(max_size=80) | st.builds(lambda kind, subtype, rest: kind + b"/" + subtype + rest, KINDS, SUBTYPES, st.binary(max_size=20)),
    st.booleans(),
)
def test_nothing_but_the_list_is_ever_relayed(value: bytes, is_json: bool) -> None:
    """Whatever a server writes, the header is one of the list, in printable ASCII, and relaying it again changes nothing."""
    relayed = relayed_type(value, is_json)
    assert ALLOWED.fullmatch(relayed), relayed
    assert relayed_type(relayed, is_json) == relayed
