"""The events that change the health of a server: results of probes and of requests, each with the generation that it is about."""

from attrs import frozen

from multiverse_gateway.core.activity import Running
from multiverse_gateway.core.failover import Failure, FailureClass


@frozen
class ProbePassed:
    """A probe found the server well.

    `forced`: a person asked for it. `let_in`: the server also let in a request that needs the key, if it wants one.
    """

    generation: int
    warning: str | None = None
    models: tuple[str, ...] = ()
    forced: bool = False
    let_in: bool = False


@frozen
class ProbeFailed:
    """A probe found the server unhealthy. `correlated`: nearly all others failed as well, so the gateway's own network is suspected."""

    generation: int
    reason: str
    unauthorized: bool = False
    correlated: bool = False
    forced: bool = False


@frozen
class ProbeTimedOut:
    """A probe got no answer in time.

    `is_busy`: bytes of other answers of the server arrived meanwhile. `running` is the oldest attempt that runs on the server, if any.
    `correlated` and `forced` as in `ProbeFailed`.
    """

    generation: int
    reason: str
    is_busy: bool = False
    running: Running | None = None
    correlated: bool = False
    forced: bool = False


@frozen
class Refused:
    """The server refused a request of the gateway's own to the API path, sent with the stored key if there is one."""

    generation: int
    reason: str
    path: str


@frozen
class AttemptPassed:
    """A request to the API path was answered in full."""

    generation: int
    path: str = ""


@frozen
class AttemptFailed:
    """A request to the API path failed.

    `client` is the key or address that sent it, `number` the gateway's own number of the request: nothing that a client can choose.
    Without `counts` the server is not blamed; what it said of itself (busy …) still holds.
    """

    generation: int
    client: str
    number: int
    failure: Failure
    path: str
    counts: bool = True

    @property
    def concerns_host(self) -> bool:
        """Whether the failure says something about all models of the host: it was not reached, or it asked for a pause."""
        return self.failure.kind is FailureClass.CONNECT or self.failure.kind is FailureClass.BUSY


HealthEvent = ProbePassed | ProbeFailed | ProbeTimedOut | Refused | AttemptPassed | AttemptFailed
