"""Where stored responses are: a response of the Responses API stays on the server that made it, and only its caller may name it.

1. A response is found by its id and its caller together. A foreign id and an unknown one are therefore the same case, and no server can
   answer one caller with an id that leads another caller to it.
2. Only a digest of the two is kept: ids are chosen by servers, and are of any length.
3. What is kept is bounded: each entry for `KEPT_SECONDS`, in a process `MOST_KEPT` of them, and the oldest are dropped first.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from urllib.parse import parse_qsl

import msgspec
from attrs import define, field, frozen

from multiverse_gateway.core.dialects import Dialect
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.errors import ResponseNotFound
from multiverse_gateway.core.lenient import BOM, legible
from multiverse_gateway.core.servers import ServerId

KEPT_SECONDS = 3600.0
"""How long a response can be named after it was made."""
MOST_KEPT = 10_000
"""Responses that a process knows without asking the store."""
MAX_ID = 1024
"""Characters of an id; a response with a longer one is not kept."""

_PATH = re.compile(r"/v1/responses/([^/]+)(?:/([^/]+))?")
_METHODS = {None: ("GET", "DELETE"), "input_items": ("GET",)}
_TRUE = frozenset({"true", "1", "yes", "on"})


@frozen
class StoredResponse:
    """A response, and the server that has it: `key` is made of its id and its caller, `until` is in epoch seconds."""

    key: str
    server_id: ServerId
    generation: int
    until: float


def response_key(caller: str, response_id: str) -> str:
    """Return what stands for a response of a caller: a client key or an address.

    >>> response_key("192.0.2.7", "resp_1") == response_key("192.0.2.8", "resp_1")
    False
    """
    return sha256(f"{caller}\n{response_id}".encode(errors="surrogatepass")).hexdigest()


@define
class StoredResponses:
    """The responses that a process knows, and those among them that the store does not have yet."""

    _known: dict[str, StoredResponse] = field(factory=dict, init=False)
    _unsaved: dict[str, StoredResponse] = field(factory=dict, init=False)

    def add(self, response: StoredResponse) -> None:
        """Keep a response that a server has just made; the same id of the same caller counts as it was used last."""
        self.learn(response)
        _put(self._unsaved, response)

    def learn(self, response: StoredResponse) -> None:
        """Keep a response that the store knows."""
        _put(self._known, response)

    def find(self, key: str, wall: float) -> StoredResponse | None:
        """Return a response that this process knows, unless its time is over."""
        response = self._known.get(key)
        return response if response is not None and response.until > wall else None

    @property
    def unsaved(self) -> Sequence[StoredResponse]:
        """What the store does not have yet."""
        return tuple(self._unsaved.values())

    def saved(self, responses: Sequence[StoredResponse]) -> None:
        """Take note that the store has these; what was added again meanwhile stays unsaved."""
        for response in responses:
            if self._unsaved.get(response.key) is response:
                del self._unsaved[response.key]


def _put(kept: dict[str, StoredResponse], response: StoredResponse) -> None:
    kept.pop(response.key, None)
    kept[response.key] = response
    if len(kept) > MOST_KEPT:
        del kept[next(iter(kept))]


def lookup_of(method: str, path: str, query: bytes) -> Envelope | None:
    """Return the envelope of a call for a response that is stored, `None` for any other call. Its model is that of the server.

    >>> found = lookup_of("GET", "/v1/responses/resp_1", b"stream=true")
    >>> found.response_id, found.stream
    ('resp_1', True)
    >>> lookup_of("POST", "/v1/responses/input_tokens", b"") is None
    True
    """
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    response_id, part = match.groups()
    if method not in _METHODS.get(part, ()) and (method != "POST" or part is None):
        return None
    return Envelope(
        model="",
        stream=method == "GET" and part is None and _asks_for_stream(query),
        stateful=True,
        wants_usage=False,
        path=path,
        dialect=Dialect.RESPONSES,
        names_response=True,
        response_id=response_id,
        method=method,
        is_lookup=True,
    )


def _asks_for_stream(query: bytes) -> bool:
    values = [value for name, value in parse_qsl(query.decode("latin-1")) if name == "stream"]
    return bool(values) and values[-1].lower() in _TRUE


class _Answer(msgspec.Struct, gc=False):
    id: str | None = None


_ANSWER = msgspec.json.Decoder(_Answer)


def id_of(body: bytes) -> str | None:
    """Return the id of the response that a JSON answer is, `None` when it has none that could be named again.

    >>> id_of(b'{"id": "resp_1", "object": "response"}'), id_of(b'{"id": 7}'), id_of(b"[]")
    ('resp_1', None, None)
    """
    try:
        try:
            return usable_id(_ANSWER.decode(body).id)
        except msgspec.DecodeError:
            return usable_id(_ANSWER.decode(legible(body.removeprefix(BOM))).id)
    except (ValueError, RecursionError):
        return None


def usable_id(value: object) -> str | None:
    """Return the id of a response if it is a text of a reasonable length."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_ID else None


def response_not_found() -> ResponseNotFound:
    """Return the refusal of a response that is unknown, another caller's, or on a server that is gone."""
    return ResponseNotFound(
        "There is no such stored response. Stored responses live on the one server that made them, and the gateway knows them for an hour; "
        "this one is not known here, or its server was removed or changed. Send the whole conversation as input instead.",
        param="previous_response_id",
    )


def model_elsewhere(model: str) -> ResponseNotFound:
    """Return the refusal of a request for one model that continues a response on a server of another one."""
    return ResponseNotFound(
        f"The stored response is on a server that does not have the model {model!r}. Stored responses live on the one server that made "
        "them. Send the model that made it, or the whole conversation as input instead.",
        param="model",
    )
