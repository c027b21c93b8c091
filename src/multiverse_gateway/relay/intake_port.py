"""What the direct door asks of the rules for incoming requests, which stand above it (`entry.intake`)."""

from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.relay.exchange import Exchange
from multiverse_gateway.relay.heads import Headers, RequestHead
from multiverse_gateway.relay.ports import Client


class HasLines(Protocol):
    """A request on its way in, as far as the door looks at it."""

    def lines(self) -> bytes:
        """Return the header lines that every response to the request has, as HTTP/1.1 writes them."""


V = TypeVar("V", bound=HasLines)
"""What the rules make of the head of a request; the door passes it back with each question about that request."""


class EarlyResponse(Protocol):
    """A response to a request that reaches no exchange."""

    @property
    def status(self) -> int:
        """Return the HTTP status code of the refusal."""

    @property
    def headers(self) -> Headers:
        """Return the headers, without a length."""

    @property
    def body(self) -> bytes:
        """Return the body of the refusal, JSON in the form of the API."""

    @property
    def closes(self) -> bool:
        """Return whether the connection cannot be used after it."""


class IntakePort(Protocol[V]):
    """The rules for incoming requests. The door reads and writes; these decide."""

    def request(self, head: RequestHead, length: int, peer: str | None) -> V:
        """Note a request; `length` is the number of its `Content-Length`, or 0."""

    def admit(self, request: V) -> Coroutine[Any, Any, None] | None:
        """Decide whether the body is wanted; raises the error to respond with if it is not.

        Returns a coroutine that decides if quotas are counted elsewhere; the door awaits it.
        """

    def hold(self, request: V, count: int) -> None:
        """Count bytes of the body that are held in memory; raises the error to respond with if there is no room."""

    def body_deadline(self, received: int, elapsed: float) -> float:
        """Return the seconds after its beginning by which more of a body must arrive; its last piece arrived after `elapsed` seconds."""

    def too_slow(self) -> GatewayError:
        """Return the error for a body that arrives too slowly."""

    def misread(self, message: str) -> GatewayError:
        """Return the error for a request that is not proper HTTP."""

    def begin(self, request: V, body: bytes, client: Client) -> Exchange:
        """Make the exchange, or raise the error to respond with."""

    def refuse(self, request: V, error: Exception) -> EarlyResponse:
        """Return the response for an error."""

    def release_body(self, request: V) -> None:
        """Stop counting the bytes that are held of the body. A second call changes nothing."""
