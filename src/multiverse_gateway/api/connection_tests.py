"""The connection test for the API: its steps in five groups, with findings as categories only."""

import attrs

from multiverse_gateway.api.request_types import UNNAMED
from multiverse_gateway.api.response_types import Step, TestResult
from multiverse_gateway.connection_test import StepResult, examine, means_of
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.health.listing import ANSWERS_UNLISTED, is_doubtful
from multiverse_gateway.core.registry_plans import Description
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult, ProbeStep
from multiverse_gateway.registration import candidate, refuse_address, try_unlisted

_NOT_DIALLED = frozenset({ProbeStep.URL, ProbeStep.NAME, ProbeStep.ADDRESS})
"""The steps before the gateway connects: if one of them fails, the URL itself is unusable."""


async def try_connection(gateway: Gateway, registration: Description) -> TestResult:
    """Test a server without registering it, with the steps that registering takes.

    The server is asked for one token only if a model is named that it does not list, as registering does; the test ends before that for any
    other model, because loading one can take long.

    Raises:
        BadRequest: The address is closed.
    """
    refuse_address(gateway, registration.endpoint_url)
    server = candidate(gateway, registration)
    last: StepResult | None = None
    async for result in examine(server, None, means_of(gateway, server, chats=False)):
        last = result
    assert last is not None
    found = last.result
    assert found is not None
    if server.asked_model == UNNAMED and found.models:
        found = attrs.evolve(found, warning=None)
    steps = _steps(last.step, found)
    if not found.passed or not is_doubtful(found.warning) or server.asked_model == UNNAMED:
        return TestResult(ok=found.passed, reason=found.reason, warning=found.warning, steps=steps)
    try:
        await try_unlisted(gateway, server, found.models)
    except GatewayError as error:
        failed = Step(step="chat", ok=False, message=error.message)
        return TestResult(ok=False, reason=error.message, warning=found.warning, steps=[*steps, failed])
    answered = Step(step="chat", ok=True, message="The model answers")
    return TestResult(ok=True, reason=None, warning=ANSWERS_UNLISTED, steps=[*steps, answered])


def _steps(ended_at: ProbeStep, result: ProbeResult) -> list[Step]:
    """Return the steps up to the one that ended the test."""
    reason = result.reason or "The server did not answer as expected"
    if not result.passed and ended_at in _NOT_DIALLED:
        return [Step(step="address", ok=False, message=reason)]
    reached = result.passed or ended_at is ProbeStep.ACCESS
    steps = [
        Step(step="address", ok=True, message="The URL can be used"),
        Step(step="answer", ok=reached, message="The server answers" if reached else reason),
    ]
    if reached:
        steps.append(Step(step="key", ok=result.passed, message="The server lets the gateway in" if result.passed else reason))
    if result.passed:
        steps.append(Step(step="model", ok=result.warning is None, message=result.warning or "The server offers models"))
    return steps
