"""What the parts of an exchange use of the gateway, and what they see of their exchange."""

from collections.abc import Callable, Sequence
from typing import Protocol

from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.failover import Failure
from multiverse_gateway.core.health import HealthEvent
from multiverse_gateway.core.load import Admission, Load
from multiverse_gateway.core.needs import Needs
from multiverse_gateway.core.routing import Candidates
from multiverse_gateway.core.servers import Server, ServerId
from multiverse_gateway.relay.client_response import ClientResponse
from multiverse_gateway.relay.ports import ClientRequest, Limits, Phase
from multiverse_gateway.relay.requests import Requests
from multiverse_gateway.relay.waiting import WaitingRoom


class HealthReports(Protocol):
    """The object that learns how attempts went (`health_book`)."""

    def passed(self, server: Server, path: str) -> None:
        """Report an attempt that succeeded to the health machine."""

    def has_answered(self, server: Server, path: str) -> bool:
        """Return whether the server has answered this call before."""

    def was_cut(self, server: Server, needs: Needs, prompt_tokens: int) -> bool:
        """Return whether the server has probably read only a part of a text, of which it counted so many tokens."""

    def note_cut(self, server: Server) -> None:
        """Count a text of which the server has read only a part."""

    def report(self, server_id: ServerId, event: HealthEvent) -> None:
        """Report anything else to the health machine."""


class Checks(Protocol):
    """The object that probes servers (`server_checks`)."""

    def ask(self, server: Server, probed: Callable[[bool], None]) -> None:
        """Probe a server that keeps an attempt waiting; `probed` learns whether it is alive, never during this call."""


class KnownResponses(Protocol):
    """Where it is noted which server has which stored response (`response_places`)."""

    def keep(self, source: str, server: Server, response_id: str) -> None:
        """Remember that a server keeps a response for the key or address `source`."""


class Resources(Protocol):
    """The parts of the gateway that exchanges share: its clocks, its queue, its table, its books."""

    limits: Limits
    load: Load
    admission: Admission
    room: WaitingRoom
    requests: Requests

    @property
    def health_book(self) -> HealthReports:
        """Return the object that learns how attempts went."""

    @property
    def checks(self) -> Checks:
        """Return the object that probes servers."""

    @property
    def responses(self) -> KnownResponses:
        """Return where it is noted which server has which stored response."""

    def now(self) -> float:
        """Return the clock that measures intervals, in seconds."""

    def wall(self) -> float:
        """Return the time of day, in epoch seconds."""

    def random(self) -> float:
        """Return a random number in [0, 1)."""

    def notice_pause(self, now: float) -> None:
        """Postpone the exchanges if this process was stopped and nothing of what is due was looked at since."""

    def candidates(self, envelope: Envelope, excluded: frozenset[ServerId], now: float) -> Candidates | None:
        """Return the servers that could serve a request now; `None` for a model that is not registered."""

    def is_registered(self, server: Server) -> bool:
        """Return whether a server was neither removed nor changed in anything that an answer depends on."""

    def has_slot(self, server: Server) -> bool:
        """Return whether a server is registered as it was, and may have one more request now."""

    def model_names(self) -> Sequence[str]:
        """Return the names of all models."""

    def pick(self, servers: Sequence[Server], envelope: Envelope) -> Server:
        """Return the server that the balancer chooses from the candidates."""

    def budget_refused(self) -> None:
        """Count a retry that the model's budget did not let begin in time."""

    def soon(self, call: Callable[[], None]) -> None:
        """Call a function in the next turn of the event loop, after everything else that is ready."""

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after so many seconds."""


class Journey(Protocol):
    """An exchange, as its attempt and the reader of its answer see it. They report what happened; the exchange decides what follows."""

    request: ClientRequest
    response: ClientResponse
    phase: Phase
    due: float
    deadline: float

    def fail_attempt(self, failure: Failure) -> None:
        """Replace the attempt, which failed before the commit point, or give up."""

    def repeat_without_usage(self) -> None:
        """Make the attempt again without the field that asks for token counts, which the server may have refused."""

    def answer(self, content_type: bytes, body: bytes) -> None:
        """Commit to the answer and send it: it is whole."""

    def begin_answer(self, content_type: bytes, *, is_stream: bool = False) -> None:
        """Commit to the answer and send its head: it is relayed as it comes."""

    def complete(self) -> None:
        """End the answer: all of it was relayed."""

    def break_answer(self, failure: Failure | None) -> None:
        """End the answer, whose rest cannot be relayed; without a failure, because of a limit of the gateway."""

    def refuse_answer(self, error: GatewayError) -> None:
        """Drop the answer, which the gateway may not relay. No server is to blame."""

    def hold(self, count: int) -> bool:
        """Count so many bytes of the answer as held; without room for them the request ends, and this returns false."""

    def expect_more(self) -> None:
        """Set the instant by which more of the answer has to come."""

    def end(self) -> None:
        """End the exchange, whose answer is complete and whose connection is free."""
