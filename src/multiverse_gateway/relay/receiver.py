"""The receiver of a server's answer, and the failures that it gets from the wire instead of one."""

from collections.abc import Mapping
from typing import Protocol

from multiverse_gateway.core.addresses import AddressRefusal, explained
from multiverse_gateway.core.failover import ConnectFailure, Failure, FailureClass


class Receiver(Protocol):
    """What gets the answer to a request.

    It is called on the event loop, and may call `WireSending.abort`, `pause`, `resume` and `Wire.send` at any time.
    """

    def head(self, status: int, headers: Mapping[bytes, bytes], /) -> None:
        """Take the head: names in lower case, of repeated ones the last value."""

    def body(self, data: bytes, /) -> None:
        """Take a piece of the body."""

    def end(self) -> None:
        """Take the end of a complete answer; its connection is already kept or closed."""

    def failed(self, failure: Failure, /) -> None:
        """End the attempt for any other reason than a complete answer."""


def _broken(reason: str) -> Failure:
    return Failure(FailureClass.BROKEN, reason, after_request=True)


CLOSED = _broken("the server closed the connection before its answer was complete")
STALE = Failure(FailureClass.BROKEN, "the server closed a reused connection without an answer", is_stale=True)
GARBAGE = _broken("the server's answer is not HTTP")
STALLED = _broken("the server stopped reading the request")
TOO_LARGE = Failure(FailureClass.NONSENSE, "the head of the server's answer is too large")
INTERIM = Failure(FailureClass.NONSENSE, "the server sends too many interim responses")
CODED = Failure(FailureClass.NONSENSE, "the server uses a transfer coding that the gateway did not ask for")
STATUS = Failure(FailureClass.NONSENSE, "the server's answer has an invalid status")
BUG = Failure(FailureClass.LOCAL, "the gateway could not handle the server's answer")
STOPPING = Failure(FailureClass.LOCAL, "the gateway is shutting down")

_CONNECTING: Mapping[ConnectFailure, str] = {
    ConnectFailure.RESOLVE: "the name of the server could not be resolved",
    ConnectFailure.REFUSED_ADDRESS: "the gateway may not connect to this address",
    ConnectFailure.TIMEOUT: "the connection could not be made in time",
    ConnectFailure.REFUSED: "the connection was refused",
    ConnectFailure.TLS: "the connection could not be secured (TLS)",
    ConnectFailure.NO_TLS: "the port is open, but the answer is not TLS",
    ConnectFailure.TLS_TIMEOUT: "the port is open, but gave no answer in TLS in time",
    ConnectFailure.OTHER: "the connection could not be made",
}


def unreached(cause: ConnectFailure, refusal: AddressRefusal | None = None) -> Failure:
    """Return the failure of a request whose connection could not be made; `refusal` says why its address is forbidden."""
    reason = _CONNECTING[cause] if refusal is None else f"{_CONNECTING[cause]}: {explained(refusal)}"
    return Failure(FailureClass.CONNECT, reason, connect=cause, refusal=refusal)
