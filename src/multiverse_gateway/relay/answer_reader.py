"""How an attempt and the reader of its answer see each other."""

from collections.abc import Mapping
from typing import Protocol

from multiverse_gateway.core.failover import Failure, classify_report
from multiverse_gateway.core.servers import Server
from multiverse_gateway.core.sse import EventStream
from multiverse_gateway.relay.ports import ClientRequest, Limits
from multiverse_gateway.relay.resources import Journey, Resources


class Reader(Protocol):
    """What an attempt reads its answer with, from the head on."""

    received: int

    @property
    def events(self) -> EventStream | None:
        """The events of a stream."""

    @property
    def usage(self) -> tuple[int, int]:
        """Prompt and completion tokens as the server reported them in the answer, 0 where it did not.

        Servers report the tokens of a stream at its end: if it ended early, those that came are counted.
        """

    @property
    def holds_part(self) -> bool:
        """Whether it collects an answer of which some has come."""

    def feed(self, data: bytes) -> None:
        """Take a piece of the body."""

    def end(self) -> None:
        """Take the regular end of the body."""

    def failed(self, failure: Failure) -> None:
        """Take any other end of the connection."""

    def read_on(self) -> None:
        """Continue after the client has read what was sent."""

    def close(self) -> None:
        """Take no more, and hold the attempt no longer: it has given its slot back."""


class Answered(Protocol):
    """An attempt, as the reader of its answer sees it."""

    exchange: Journey
    resources: Resources
    request: ClientRequest
    limits: Limits
    server: Server
    status: int
    headers: Mapping[bytes, bytes]
    asks_usage: bool

    def may_refuse_usage(self, status: int) -> bool:
        """Return whether a server that answers with this status may have refused the field that the gateway added."""

    def note_response(self, value: object) -> None:
        """Remember the id of a stored response before the client can use it."""

    def read_with(self, reader: "Reader") -> None:
        """Let another reader take the rest of the body."""

    def pause(self) -> None:
        """Stop reading from the server."""

    def resume(self) -> None:
        """Resume reading from the server."""

    def abort(self) -> None:
        """Close the connection, if there still is one."""


def fail_as_reported(attempt: Answered, report: bytes) -> None:
    """Fail an attempt, or make it again without what the gateway added: the server reported an error with status 200."""
    failure = classify_report(
        report,
        attempt.headers,
        now_wall=attempt.resources.wall(),
        request=attempt.request.body,
        names_response=attempt.request.envelope.names_response,
    )
    if attempt.may_refuse_usage(failure.status or 500):
        attempt.abort()
        attempt.exchange.repeat_without_usage()
    else:
        attempt.exchange.fail_attempt(failure)
