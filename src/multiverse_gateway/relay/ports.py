"""What an exchange is made of that knows nothing of it: the client and its request, the request to a server, the limits, the phases."""

from enum import Enum
from typing import Protocol

import attrs

from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.failover import RetryPolicy
from multiverse_gateway.core.usage import OPERATOR
from multiverse_gateway.relay.heads import Headers, HeadFacts

CUT_SECONDS = 0.1
"""How long a connection stays open after the last event of a response that is cut: browsers drop data that arrives right before the end."""
UNCOUNTED_BYTES = 65536
"""What every exchange may hold of an answer without asking the budget: most answers are smaller."""


class Client(Protocol):
    """The door's side: one response. During these calls it may call `client_clogged` and `taken` on the exchange, nothing else."""

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole response; nothing else is called then. The door calls `taken` once the client has all of it, or is gone."""

    def head(self, status: int, headers: Headers) -> None:
        """Send the head of a response whose length is not known; called once."""

    def body(self, data: bytes) -> None:
        """Send a piece of the body."""

    def end(self) -> None:
        """Finish a response of which everything has been sent."""

    def cut(self) -> None:
        """Finish a response whose end is missing, so that the client can tell."""


@attrs.define(eq=False)
class ClientRequest:
    """A request that arrived in full: all that is known before anything is done about it.

    Nothing changes it, except that `envelope` learns the server of a stored response. `arrived` is when its head arrived, on the monotonic
    clock. The queue is fair between callers, and strikes against servers name them, by `caller.quota`; use is counted by `caller.name`.
    """

    envelope: Envelope
    body: bytes
    request_id: str
    arrived: float
    caller: Caller
    facts: HeadFacts

    @property
    def explains(self) -> bool:
        """Whether the client asks why each server was chosen, and may see it."""
        return self.facts.explains and self.caller.name == OPERATOR

    def take_back(self) -> None:
        """Count the request toward no limit of its client: it is refused, and will not be answered. Called once, before it is refused."""


class Sending(Protocol):
    """One request on its way to a server (`relay.wire`)."""

    def abort(self) -> None:
        """Close the connection now; nothing more is called on the exchange."""

    def pause(self) -> None:
        """Stop reading from the server until `resume`."""

    def resume(self) -> None:
        """Resume reading from the server."""


@attrs.frozen(kw_only=True)
class Limits:
    """Seconds and bytes that bound one exchange."""

    request_timeout: float = 300.0
    first_byte_timeout: float = 120.0
    idle_timeout: float = 60.0
    queue_timeout: float = 60.0
    bulk_queue_timeout: float = 240.0
    max_response_bytes: int = 16 << 20
    max_embeddings_bytes: int = 64 << 20
    max_event_bytes: int = 1 << 20
    max_large_event_bytes: int = 16 << 20
    max_stream_bytes: int = 64 << 20
    max_stream_seconds: float = 3600.0
    retry_policy: RetryPolicy = attrs.field(factory=RetryPolicy)
    unchecked_bytes: int = attrs.field(init=False)
    """What may come of a body before the other limits and the budget are looked at."""

    @unchecked_bytes.default
    def _least_limit(self) -> int:
        return min(UNCOUNTED_BYTES, self.max_response_bytes)


class Phase(Enum):
    """The phase of an exchange, from choosing a server to its end."""

    CHOOSING = "choosing"
    QUEUED = "queued"
    TRYING = "trying"
    BACKOFF = "backoff"
    RELAYING = "relaying"
    DRAINING = "draining"
    OVER = "over"
