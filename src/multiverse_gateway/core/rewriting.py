"""Change a request that a server is sent, and leave every other byte of its body as it is."""

from __future__ import annotations

import msgspec
from msgspec import Raw, Struct

from multiverse_gateway.core.forms import is_form, read_form

_USAGE_FIELD = b'"stream_options":{"include_usage":true},'


def asking_for_usage(body: bytes) -> bytes:
    """Return the body of a request, a JSON object with a field at least, that also asks for the tokens of its stream.

    >>> asking_for_usage(b' {"model": "m", "stream": true}')
    b' {"stream_options":{"include_usage":true},"model": "m", "stream": true}'
    """
    place = body.index(b"{") + 1
    return b"".join((memoryview(body)[:place], _USAGE_FIELD, memoryview(body)[place:]))


def with_model(body: bytes, content_type: str, model: str) -> bytes:
    """Return the body of a request with another name of its model; all other bytes stay as they are.

    `core.reading.read_envelope` must have accepted the body.

    >>> with_model(b'{"messages": [], "model" : "llama3.2"}', "application/json", "llama3.2:latest")
    b'{"messages": [], "model" : "llama3.2:latest"}'
    """
    if is_form(content_type):
        place, value = read_form(content_type, body)["model"], model.encode()
    else:
        place, value = _place_of_model(body), msgspec.json.encode(model)
    return b"".join((memoryview(body)[: place.start], value, memoryview(body)[place.stop :]))


class _Named(Struct, gc=False):
    model: Raw


def _place_of_model(body: bytes) -> slice:
    """Return where a JSON object has the value of its top-level field `model`.

    msgspec does not report positions, but what it returns as `Raw` is a view of the text that it read. So the value is found by
    overwriting halves of a copy and looking whether the view changes; this takes less time than parsing the text a second time.
    """
    text = bytearray(body)
    value = memoryview(msgspec.json.decode(text, type=_Named).model)
    first, last = 0, len(text) - len(value)
    while first < last:
        middle = (first + last) // 2
        text[first : middle + 1] = bytes(middle + 1 - first)
        if value[0]:  # a quotation mark, and not overwritten: the value begins later
            first = middle + 1
        else:
            text[first : middle + 1] = body[first : middle + 1]
            last = middle
    return slice(first, first + len(value))
