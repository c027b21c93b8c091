"""What a request needs of a server, as far as the servers of its model differ in it: abilities, and room for its text.

1. A request is looked at only if it may matter: if servers of its model are known to differ in an ability, or if its body is so large
   that its text may not fit into the smallest context (`Bounds`).
2. Unknown counts as able, and a context counts only while it is measured on the loaded model. Of a measured and a declared context the
   smaller one counts.
3. If some active server can do what a request needs, only such servers get it, even if it has to wait. If none can, every server may get
   it: the answer of the server says best why.
4. Text is counted in characters, not tokens. A token is three or four characters of most texts, but can be many more. Therefore
   characters ÷ 3 only prefer a server, and only characters ÷ 32 are so many tokens for certain that the gateway refuses them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from attrs import field, fields, frozen

from multiverse_gateway.core.engine_facts import UNKNOWN, Abilities, Measured
from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.core.patience import without_images
from multiverse_gateway.core.servers import Server

USUAL_CHARACTERS = 3
"""Characters of a token, of usual text, or fewer."""
MOST_CHARACTERS = 32
"""Characters of a token, of any text, or more."""
CUT_CHARACTERS = 8
"""If a server counted so many characters as a token, it did not read all of a long text."""
MAX_VALUES = 50_000
"""Values in the JSON of a request that is looked at. A body with more of them is not: to walk through it would take too long."""

_ABILITIES = tuple(ability.name for ability in fields(Abilities))
_BY_PATH: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/reranking": "rerank",
}
_BY_TYPE: Mapping[str, str] = {"image_url": "vision", "input_image": "vision", "image": "vision", "input_audio": "audio"}
"""What a part of a message needs, by its type: that of OpenAI's two APIs, or of Anthropic's."""
_HINTS: Mapping[str, tuple[bytes, ...]] = {"tools": (b'"tools"',), "vision": (b'"image', b'"input_image'), "audio": (b'"input_audio',)}
"""Bytes without which a body does not need an ability."""
_TEXTS = ("messages", "prompt", "input", "system", "tools")
_SIZED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"})
_ENCODED = frozenset({"data", "file_data", "b64_json"})
"""Members that hold base64, not text."""
_PIECE = 1024


class ContextLengthExceeded(BadRequest):
    """The request's text is longer than the context of every server of the model, whatever the text is."""

    code = "context_length_exceeded"


@frozen
class Needs:
    """What a request needs of a server: `abilities`, named as in `Abilities`, and room for `characters`, 0 if they fit anywhere."""

    abilities: frozenset[str] = frozenset()
    characters: int = 0


@frozen(kw_only=True)
class Bounds:
    """What is to be looked at in a request before one of a model's servers is chosen.

    The servers differ in the abilities `differing`. `least_context` is the smallest known context of a server, and `largest_context` the
    largest one, if the context of every server is known. Bodies of up to `most_bytes` need no look; -1 means that all of them do.
    """

    differing: frozenset[str] = frozenset()
    least_context: int | None = None
    largest_context: int | None = None

    most_bytes: int = field(init=False)

    @most_bytes.default
    def _find_most_bytes(self) -> int:
        return -1 if self.differing else USUAL_CHARACTERS * (self.least_context or 0)


def context_of(server: Server, measured: Measured | None) -> int | None:
    """Return how many tokens of one request a server has room for, `None` while that is not measured."""
    context = None if measured is None else measured.context
    declared = server.capabilities.context_length
    return context if context is None or declared is None else min(context, declared)


def can(measured: Measured | None, abilities: Iterable[str]) -> bool:
    """Return whether a server can do all of this, as far as is known."""
    if measured is None:
        return True
    known = measured.abilities
    return all(getattr(known, name) is not False for name in abilities)


def bounds_of(active: Sequence[tuple[Server, Measured | None]]) -> Bounds | None:
    """Return what is to be looked at in requests to these servers, `None` if nothing is: that is so while nothing is measured."""
    if all(measured is None for _, measured in active):
        return None
    contexts = [context_of(server, measured) for server, measured in active]
    known = [context for context in contexts if context is not None]
    kinds = {UNKNOWN if measured is None else measured.abilities for _, measured in active}  # a thousand servers are of a few kinds
    lacking = [{getattr(kind, name) is False for kind in kinds} for name in _ABILITIES]
    differing = frozenset(name for name, answers in zip(_ABILITIES, lacking, strict=True) if len(answers) > 1)
    if not known and not differing:
        return None
    return Bounds(
        differing=differing,
        least_context=min(known, default=None),
        largest_context=max(known) if len(known) == len(contexts) else None,
    )


def needs_of(bounds: Bounds, path: str, body: bytes) -> Needs:
    """Return what a request needs, as far as the servers differ in it.

    >>> needs_of(Bounds(differing=frozenset({"tools"})), "/v1/chat/completions", b'{"tools": [{}], "messages": []}')
    Needs(abilities=frozenset({'tools'}), characters=0)
    >>> needs_of(Bounds(least_context=1024), "/v1/completions", b'{"prompt": "' + 4096 * b"a" + b'"}')
    Needs(abilities=frozenset(), characters=4096)
    """
    abilities = {_BY_PATH.get(path)} & bounds.differing
    hinted = [name for name, hints in _HINTS.items() if name in bounds.differing and any(hint in body for hint in hints)]
    is_long = bounds.least_context is not None and path in _SIZED and len(body) > USUAL_CHARACTERS * bounds.least_context
    content = _content(body) if hinted or is_long else {}
    if "tools" in hinted and content.get("tools"):
        abilities.add("tools")
    if hinted:
        abilities |= _needed_by_parts(content) & bounds.differing
    characters = _characters(content) if is_long else 0
    return Needs(frozenset(name for name in abilities if name is not None), characters - characters % _PIECE)


def is_too_long(bounds: Bounds, needs: Needs) -> bool:
    """Return whether a text cannot fit into any context, whatever it is."""
    return bounds.largest_context is not None and needs.characters > MOST_CHARACTERS * bounds.largest_context


def fits(needs: Needs, context: int | None) -> bool:
    """Return whether a text fits into a context if it is usual text."""
    return context is None or needs.characters <= USUAL_CHARACTERS * context


def was_cut(needs: Needs, context: int | None, prompt_tokens: int) -> bool:
    """Return whether a server has silently read only a part of a long text: it counted far too few tokens, as many as its context has.

    >>> was_cut(Needs(characters=80_000), 4096, 4096), was_cut(Needs(characters=80_000), 4096, 20_000), was_cut(Needs(), 4096, 4096)
    (True, False, False)
    """
    if context is None or fits(needs, context) or not context <= 4 * prompt_tokens:
        return False
    return needs.characters > CUT_CHARACTERS * prompt_tokens


def _content(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object that does not have too many values; of any other body none.

    A large body is read without the images in it. Where that leaves no JSON, because a text begins like an image, all of it is read.
    """
    smaller = without_images(body)
    fields = _decoded(smaller)
    if fields is None and smaller is not body:
        fields = _decoded(body)
    return fields if isinstance(fields, dict) else {}


def _decoded(body: bytes) -> Any:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        return None
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None


def _needed_by_parts(fields: Mapping[str, Any]) -> set[str]:
    """Return what the parts of messages need: images and sounds."""
    needed, pending = set(), [fields.get("messages"), fields.get("input")]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind in _BY_TYPE:
                needed.add(_BY_TYPE[kind])
            pending += value.values()
    return needed


def _characters(fields: Mapping[str, Any]) -> int:
    """Return the characters of a request's text. Of several inputs or prompts only the longest counts: each has the context for itself."""
    total = 0
    for name in _TEXTS:
        value = fields.get(name)
        if name in ("prompt", "input") and isinstance(value, list) and all(isinstance(item, str) for item in value):
            total += max(map(_length, value), default=0)
        else:
            total += _length(value)
    return total


def _length(value: Any) -> int:
    """Return the characters of all text in a value, without `data:` URLs and base64."""
    length, pending = 0, [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            length += 0 if value.startswith("data:") else len(value)
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += [item for name, item in value.items() if name not in _ENCODED or not isinstance(item, str)]
    return length
