"""What is known about a registered server: facts only, changed by `attrs.evolve` and one assignment."""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, NewType

import attrs
from msgspec import Meta

ServerId = NewType("ServerId", str)
HostId = NewType("HostId", str)

MODEL_NAME = re.compile(r"[A-Za-z0-9._:/@+-]{1,128}")
MAX_CONCURRENCY = 4096
MAX_WEIGHT = 100
MAX_DAILY_LIMIT = 100_000_000
MAX_AT_ONCE = 100_000
MAX_TOKENS = 1_000_000_000
MAX_STUDENT_ID = 128
MAX_DESCRIPTION = 1000
MAX_UPSTREAM_MODEL = 256
ONE_LINE = "^[^\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]*$"
"""What texts on one line match: no line breaks, no control characters, visible or not."""


def _or_none(text: str) -> str | None:
    """Return a text, or `None` for an empty one."""
    return text or None


_LINE = "one line of at most {:,} characters, without line breaks and invisible control characters"
_Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
StudentId = Annotated[str, Meta(max_length=MAX_STUDENT_ID, pattern=ONE_LINE, description=_LINE.format(MAX_STUDENT_ID)), _or_none]
_Description = Annotated[str, Meta(max_length=MAX_DESCRIPTION, pattern=ONE_LINE, description=_LINE.format(MAX_DESCRIPTION)), _or_none]


@attrs.frozen(kw_only=True)
class Capabilities:
    """What the host says that the server can do; `None` means that the host did not say."""

    max_tokens: _Tokens | None = None
    context_length: _Tokens | None = None
    streaming: bool = True


@attrs.frozen(kw_only=True)
class Metadata:
    """Words about the host; shown to people, never interpreted."""

    student_id: StudentId | None = None
    description: _Description | None = None


_LATEST = ":latest"


def model_key(name: str) -> str:
    """Return what stands for a model wherever models are compared: its name, without the tag that Ollama adds to a name without one.

    >>> model_key("llama3.2:latest"), model_key("llama3.2"), model_key("llama3.2:3b")
    ('llama3.2', 'llama3.2', 'llama3.2:3b')
    """
    return name.removesuffix(_LATEST) or name


def spellings(name: str) -> tuple[str, str]:
    """Return the two names that stand for the same model wherever models are compared.

    >>> spellings("llama3.2"), spellings("llama3.2:latest") == spellings("llama3.2")
    (('llama3.2', 'llama3.2:latest'), True)
    """
    key = model_key(name)
    return key, key + _LATEST


def is_among(model: str, names: Iterable[str]) -> bool:
    """Return whether a model, in any spelling of its name, is one of the named ones.

    >>> is_among("llama3.2", ["phi-4", "llama3.2:latest"]), is_among("llama3.2", ["llama3.2:3b"])
    (True, False)
    """
    return model_key(model) in map(model_key, names)


@attrs.frozen(kw_only=True)
class Server:
    """One model offered by one host: the unit that is routed to and shown.

    `endpoint_url` is the canonical root (`core.addresses.Endpoint.url`), without `/v1`. `api_key` is the server's own key in clear
    text; it never appears in `repr`, logs or answers. Both are those of its host, `host_id` (`core.hosts.Host`); a server that an older
    version registered is a host by itself, with its own id. `upstream_model` is what the engine calls the model, `None` for `model_name`.
    `generation` grows whenever the URL, the key or a name of the model changes, so that outcomes of an older one can be told apart.
    `owner_digest` is the SHA-256, in hexadecimal, of the token with which its owner may change it. `opened_address` is the loopback
    address and port, such as "127.0.0.1:11434", that the operator opened for this server alone (`core.addresses.with_opening`); a change
    of the URL closes it. Instants are epoch seconds.
    """

    id: ServerId
    model_name: str
    endpoint_url: str
    api_key: str | None = attrs.field(default=None, repr=False)
    capabilities: Capabilities = Capabilities()
    metadata: Metadata = Metadata()
    max_concurrency: int | None = None
    weight: int = 1
    generation: int = 1
    registered_at: float
    created_at: float
    updated_at: float
    owner_digest: str | None = attrs.field(default=None, repr=False)
    opened_address: str | None = None
    upstream_model: str | None = None
    host_id: HostId = attrs.field(default=attrs.Factory(lambda server: HostId(server.id), takes_self=True))

    @property
    def asked_model(self) -> str:
        """Return the name of the model that its engine is asked for."""
        return self.upstream_model or self.model_name


def share_connection(one: Server, other: Server) -> bool:
    """Return whether two servers of a host are reached in the same way, as they are unless an older version changed one of them."""
    return one.endpoint_url == other.endpoint_url and one.api_key == other.api_key


def identity(server: Server) -> tuple[str, str | None, str, str | None]:
    """Return what a verdict about a server depends on; a change of it begins a new generation."""
    return server.model_name, server.upstream_model, server.endpoint_url, server.api_key


class KeyState(StrEnum):
    """Whether a client key is accepted, and if not, why."""

    ACTIVE = "active"
    BLOCKED = "blocked"
    EXPIRED = "expired"
    REVOKED = "revoked"


@attrs.frozen(kw_only=True)
class ClientKey:
    """A user's key to the inference API, as it is kept: of the key itself only `digest`, its SHA-256 in hexadecimal.

    `hint` is the beginning and the end of the key itself, by which people recognize it; keys of older versions have none. `expires_at` and
    `revoked_at` end the key. From `blocked_at` on it is not accepted, until that is `None` again. `rate_limit` is in requests per minute;
    `None` is what holds for all keys, 0 no limit. `daily_limit` is in requests to models per day (UTC); `None` means no limit.
    `max_at_once` is how many of its requests may run and wait together when another one would have to wait; 0 means no limit, as for keys
    of older versions. The requests of a key that `is_bulk` let interactive ones go first. `models` are the models that it may use; an
    empty list means all. Instants are epoch seconds.
    """

    id: str
    name: str
    digest: str = attrs.field(repr=False)
    hint: str | None = None
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    blocked_at: float | None = None
    rate_limit: int | None = None
    daily_limit: int | None = None
    max_at_once: int = 0
    is_bulk: bool = False
    models: tuple[str, ...] = ()

    def works(self, wall: float) -> bool:
        """Return whether the key is accepted now."""
        return self.revoked_at is None and self.blocked_at is None and (self.expires_at is None or wall < self.expires_at)

    def is_over(self, wall: float) -> bool:
        """Return whether the key is revoked or has expired: it holds its name no longer."""
        return self.revoked_at is not None or (self.expires_at is not None and self.expires_at <= wall)

    def state(self, wall: float) -> KeyState:
        """Return whether the key is accepted now, and if not, why: what cannot be undone counts first."""
        if self.revoked_at is not None:
            return KeyState.REVOKED
        if self.is_over(wall):
            return KeyState.EXPIRED
        return KeyState.ACTIVE if self.blocked_at is None else KeyState.BLOCKED

    def may_use(self, model: str) -> bool:
        """Return whether the model, in any of its spellings, is one of those that it is for."""
        return not self.models or is_among(model, self.models)


@attrs.frozen(kw_only=True)
class WallLink:
    """A link that shows the state of the servers without sign-in, for one screen; of its token only `digest`, its SHA-256, is kept.

    `digest` is hexadecimal, `created_at` epoch seconds. A link works until it is removed.
    """

    id: str
    name: str
    digest: str = attrs.field(repr=False)
    created_at: float


@attrs.frozen(kw_only=True)
class KeyTerms:
    """What an operator may decide about a client key besides its name, by attribute of `ClientKey`.

    `max_at_once` of `None` is the gateway's default.
    """

    expires_at: float | None = None
    rate_limit: int | None = None
    daily_limit: int | None = None
    max_at_once: int | None = None
    is_bulk: bool = False
    models: tuple[str, ...] = ()
