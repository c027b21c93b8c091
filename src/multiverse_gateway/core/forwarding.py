"""The few headers of a client that reach a model server, besides its content type: versions and betas of the API that it speaks.

They decide what a body means to the server, so a gateway that drops them changes answers. A value is passed on only if it is a list of
words such as `2023-06-01`, `prompt-caching-2024-07-31,files-api` or `assistants=v2`; nothing else can get into the head of a request.
"""

import re
from collections.abc import Iterable, Mapping

FORWARDED = (b"anthropic-version", b"anthropic-beta", b"openai-beta")
MAX_FORWARDED_BYTES = 1024
"""Longest value of one of them."""

_NAMES = frozenset(FORWARDED)
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_ITEM = rb"%b(?:=%b)?" % (_TOKEN, _TOKEN)
_LIST = re.compile(rb"%b(?:[ \t]*,[ \t]*%b)*" % (_ITEM, _ITEM))


def forwarded_lines(fields: Iterable[tuple[bytes, bytes]], names: Mapping[bytes, bytes]) -> bytes:
    r"""Return the lines that a client's headers add to the head of a request to a server, each with its line end.

    `fields` are the headers in their order, names in lower case; `names` is a dictionary of them, which shows at the cost of three look-ups
    that there is nothing to add. A header that comes several times is one list; one that is not a list, or too long, is left out.

    >>> fields = [(b"anthropic-version", b"2023-06-01"), (b"cookie", b"a=b")]
    >>> forwarded_lines(fields, dict(fields))
    b'anthropic-version: 2023-06-01\r\n'
    """
    if _NAMES.isdisjoint(names):
        return b""
    values: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        if name in _NAMES:
            values.setdefault(name, []).append(value.strip(b" \t"))
    lists = [(name, b", ".join(values[name])) for name in FORWARDED if name in values]
    return b"".join(b"%b: %b\r\n" % (name, value) for name, value in lists if len(value) <= MAX_FORWARDED_BYTES and _LIST.fullmatch(value))
