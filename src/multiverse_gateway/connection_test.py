"""One connection test for the API, the pages and the command line: what a gateway finds at a server, one step after the other.

1. The steps are those of `ProbeStep`, in their order. The first one that fails ends the test.
2. The one exception is a closed address that a setting could open: the command dials it anyway, so that the rest can be checked.
3. Results are facts. The code that shows them writes the sentences.
"""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum

import attrs

from multiverse_gateway import plugins
from multiverse_gateway.core.addresses import AddressPolicy, AddressRefusal, Endpoint, refusal_of_any
from multiverse_gateway.core.failover import ConnectFailure, Failure
from multiverse_gateway.core.servers import Server, is_among
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.model_trials import CHAT_SECONDS, try_model
from multiverse_gateway.protocols import Client, HealthProbe, ProbeProblem, ProbeResult, ProbeStep
from multiverse_gateway.relay.wire import Wire

_PROBED = (ProbeStep.URL, ProbeStep.NAME, ProbeStep.ADDRESS, ProbeStep.CONNECTION, ProbeStep.ACCESS, ProbeStep.ANSWER)
"""The steps that every probe takes: those before the one at which it failed passed."""


class Outcome(StrEnum):
    """How a step went. `DOUBTFUL`: nothing failed, but the user should look at it."""

    PASSED = "passed"
    DOUBTFUL = "doubtful"
    FAILED = "failed"


@attrs.frozen(kw_only=True)
class StepResult:
    """What one step found.

    `result` is that of the probe which took the step, if one did. `addresses` are those of the name, `refusal` why one of them is closed,
    `address` the one that a connection was made to in `seconds`, and `cause` why there is no connection. `model` is the model to ask,
    `ability` the API path that a server without chat supports instead. `problem` is what was wrong.
    """

    step: ProbeStep
    outcome: Outcome = Outcome.PASSED
    result: ProbeResult | None = None
    addresses: tuple[str, ...] = ()
    refusal: AddressRefusal | None = None
    address: str | None = None
    seconds: float = 0.0
    cause: ConnectFailure | None = None
    model: str | None = None
    ability: str | None = None
    problem: ProbeProblem | None = None

    @property
    def is_final(self) -> bool:
        """Return whether the test ends here, because the later steps depend on this one."""
        return self.outcome is Outcome.FAILED and (self.refusal is None or not self.refusal.is_openable)


@attrs.frozen(kw_only=True)
class Means:
    """What a connection test works with.

    `check` probes a server within its own timeout and does not raise. `chat` asks for one token, within `chat_seconds`; without it the test
    ends before that. `scout` takes the steps up to the connection one by one; without it the probe's result tells how they went.
    """

    check: Callable[[Server], Awaitable[ProbeResult]]
    http: Client
    chat: HealthProbe | None = None
    chat_seconds: float = CHAT_SECONDS
    scout: Callable[[], AsyncIterator[StepResult]] | None = None


def means_of(gateway: Gateway, server: Server, *, chats: bool) -> Means:
    """Return the means of a gateway for a server: its own probe, the one that decides about registering, over the server's client."""
    chat = plugins.chat_probe(gateway.settings) if chats else None
    return Means(check=gateway.checks.check, http=gateway.network.client_for(server), chat=chat)


async def examine(server: Server, named: str | None, means: Means) -> AsyncIterator[StepResult]:
    """Yield the result of each step of a server whose URL was read; `named` is the model that the user asked for, if any.

    The step MODEL says which model is tried next: `named`, or else the first model that the server lists, if it lists any.
    """
    taken = [ProbeStep.URL]
    yield StepResult(step=ProbeStep.URL)
    if means.scout is not None:
        async for scouted in means.scout():
            taken.append(scouted.step)
            yield scouted
            if scouted.is_final:
                return
    result = await means.check(server)
    failed = result.failed_step
    for step in itertools.takewhile(lambda step: step is not failed, _PROBED):
        if step not in taken:
            yield StepResult(step=step, result=result)
    if failed is not None:
        yield StepResult(step=failed, outcome=Outcome.FAILED, result=result, problem=result.problem)
        return
    offer = _offer(result, named)
    yield offer
    if means.chat is not None and offer.model is not None:
        yield await _chat(attrs.evolve(server, model_name=offer.model, upstream_model=None), means, means.chat)


def _offer(result: ProbeResult, named: str | None) -> StepResult:
    """Return whether the server offers the model that was named, and the one to try: that one, or else the first of its list."""
    is_listed = not named or is_among(named, result.models)
    outcome = Outcome.PASSED if result.models and is_listed else Outcome.DOUBTFUL
    model = named or next(iter(result.models), None)
    return StepResult(step=ProbeStep.MODEL, outcome=outcome, result=result, model=model)


async def _chat(server: Server, means: Means, probe: HealthProbe) -> StepResult:
    trial = await try_model(server, means.http, probe, seconds=means.chat_seconds)
    outcome = Outcome.PASSED if trial.problem is None else Outcome.FAILED
    return StepResult(
        step=ProbeStep.CHAT,
        outcome=outcome,
        result=trial.result,
        model=server.asked_model,
        ability=trial.ability,
        problem=trial.problem,
    )


async def scout(wire: Wire, endpoint: Endpoint, policy: AddressPolicy, now: Callable[[], float]) -> AsyncIterator[StepResult]:
    """Take the steps from the name to the connection over a wire; `policy` is the one to judge by, the wire's own may allow more."""
    addresses = await wire.resolve(endpoint)
    if isinstance(addresses, Failure):
        yield StepResult(step=ProbeStep.NAME, outcome=Outcome.FAILED, cause=addresses.connect)
        return
    yield StepResult(step=ProbeStep.NAME, addresses=tuple(addresses))
    refusal = refusal_of_any(addresses, endpoint.port, policy)
    outcome = Outcome.PASSED if refusal is None else Outcome.FAILED
    judged = StepResult(step=ProbeStep.ADDRESS, outcome=outcome, refusal=refusal)
    yield judged
    if judged.is_final:
        return
    began = now()
    reached = await wire.reach(endpoint)
    if isinstance(reached, Failure):
        yield StepResult(step=ProbeStep.CONNECTION, outcome=Outcome.FAILED, cause=reached.connect or ConnectFailure.OTHER)
    else:
        yield StepResult(step=ProbeStep.CONNECTION, address=reached, seconds=now() - began)
