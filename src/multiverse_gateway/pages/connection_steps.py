"""The connection test as the pages show it: six steps, drawn again each time before the test waits for the server."""

from collections.abc import AsyncIterator, Callable, Mapping

import anyio
import attrs

from multiverse_gateway.connection_test import Outcome, StepResult, examine, means_of
from multiverse_gateway.core.errors import AddressForbidden, BadRequest, GatewayError, ModelNotOffered, ProbeRefused
from multiverse_gateway.core.registry_plans import Description
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.model_trials import CHAT_SECONDS
from multiverse_gateway.pages.server_form import message_of
from multiverse_gateway.pages.words import sentence
from multiverse_gateway.protocols import ProbeProblem, ProbeStep
from multiverse_gateway.registration import candidate, refuse_address

WAIT_EVERY = 5.0
WAIT_SECONDS = 600.0
MAX_CHOICES = 50
"""Models of a server that the page offers to choose from."""


@attrs.frozen(kw_only=True)
class ShownStep:
    """One step as the page shows it: `state` is good, warn, bad, busy for the step under way, or idle for one that was not reached."""

    title: str
    state: str
    message: str = ""


@attrs.frozen(kw_only=True)
class ShownTest:
    """What the test has found so far; `models` are those to choose from.

    `http_url` is the address to try instead of one whose port does not speak TLS. `wants_key`: the server did not let the gateway in.
    `is_loading`: the server is loading or busy, so waiting helps.
    """

    steps: tuple[ShownStep, ...]
    models: tuple[str, ...] = ()
    ok: bool = False
    http_url: str = ""
    wants_key: bool = False
    is_loading: bool = False

    @property
    def is_over(self) -> bool:
        """Return whether no step is under way."""
        return all(step.state != "busy" for step in self.steps)


_TITLES = ("DNS lookup", "Address allowed", "Connection", "Authentication", "Model list", "Test reply")
_PLACES: Mapping[ProbeStep, int] = {
    ProbeStep.NAME: 0,
    ProbeStep.URL: 1,
    ProbeStep.ADDRESS: 1,
    ProbeStep.CONNECTION: 2,
    ProbeStep.ACCESS: 3,
    ProbeStep.ANSWER: 4,
    ProbeStep.MODEL: 4,
    ProbeStep.CHAT: 5,
}
"""Where each step of a connection test stands in `_TITLES`."""

UNTRIED = ShownTest(steps=tuple(ShownStep(title=title, state="idle") for title in _TITLES))
"""What the page shows before the first test."""


async def try_steps(
    gateway: Gateway, registration: Description, named: str, *, opened_address: str | None = None
) -> AsyncIterator[ShownTest]:
    """Test a server, and yield how far the test has come each time before it waits, and its result at the end.

    `named` is the model that the user asked for, or empty; `opened_address` is that of the server that is edited. Nothing that the server
    sends is shown but the names of its models.
    """
    try:
        refuse_address(gateway, registration.endpoint_url, opened_address=opened_address)
    except BadRequest as error:
        yield _ended(1, message_of(error))
        return
    yield _under_way(())
    steps: tuple[ShownStep, ...] = ()
    names: tuple[str, ...] = ()
    server = candidate(gateway, registration, opened_address=opened_address)
    async for result in examine(server, named or None, means_of(gateway, server, chats=True)):
        if result.step is ProbeStep.CHAT and steps:
            chat = _chat(result)
            is_loading = result.problem is ProbeProblem.BUSY
            yield ShownTest(steps=(*steps, chat), models=names, ok=chat.state == "good", is_loading=is_loading)
        elif result.outcome is Outcome.FAILED:
            yield attrs.evolve(
                _ended(_PLACES[result.step], _reason(result)),
                http_url=server.endpoint_url.replace("https://", "http://", 1) if result.problem is ProbeProblem.NO_TLS else "",
                wants_key=result.step is ProbeStep.ACCESS,
                is_loading=result.problem is ProbeProblem.BUSY,
            )
        elif result.step is ProbeStep.MODEL:
            names = _names(result)[:MAX_CHOICES]
            steps = (*_good(4), _listing(result))
            if result.model is None:
                yield ShownTest(
                    steps=(*steps, ShownStep(title=_TITLES[5], state="idle", message="Enter the model's name and test again.")), ok=True
                )
            else:
                yield _under_way(steps)


async def wait_until_loaded(try_once: Callable[[], AsyncIterator[ShownTest]], lasts: Callable[[], bool]) -> AsyncIterator[ShownTest]:
    """Test a server every `WAIT_EVERY` seconds while it is loading, for `WAIT_SECONDS` at the longest, or until `lasts` says no."""
    until = anyio.current_time() + WAIT_SECONDS
    while True:
        loading: ShownTest | None = None
        async for test in try_once():
            if test.is_loading:
                loading = test
            else:
                yield test
        if loading is None:
            return
        if not lasts() or anyio.current_time() + WAIT_EVERY > until:
            yield loading
            return
        yield _waiting(loading)
        await anyio.sleep(WAIT_EVERY)


def _waiting(loading: ShownTest) -> ShownTest:
    """Return the steps of a test that waits for the server: the step that was not passed is under way."""
    message = f"The server is still loading. The next test is in {WAIT_EVERY:g} s."
    place = max(place for place, step in enumerate(loading.steps) if step.message)
    under_way = ShownStep(title=loading.steps[place].title, state="busy", message=message)
    return attrs.evolve(loading, steps=(*loading.steps[:place], under_way, *loading.steps[place + 1 :]), is_loading=False)


def steps_until(error: GatewayError) -> ShownTest:
    """Return the steps of a test that ended with the error of a registration or a change; untried steps if it was about something else.

    >>> [step.state for step in steps_until(AddressForbidden("private address")).steps]
    ['good', 'bad', 'idle', 'idle', 'idle', 'idle']
    """
    if isinstance(error, AddressForbidden):
        return _ended(_PLACES[ProbeStep.ADDRESS], message_of(error))
    if isinstance(error, ModelNotOffered):
        return _ended(_PLACES[ProbeStep.MODEL], message_of(error))
    if isinstance(error, ProbeRefused) and error.failed_step is not None:
        return _ended(_PLACES[ProbeStep(error.failed_step)], message_of(error))
    return UNTRIED


def _names(result: StepResult) -> tuple[str, ...]:
    return () if result.result is None else result.result.models


def _reason(result: StepResult) -> str:
    return sentence((result.result and result.result.reason) or "no answer")


def _good(count: int) -> tuple[ShownStep, ...]:
    return tuple(ShownStep(title=title, state="good") for title in _TITLES[:count])


def _under_way(done: tuple[ShownStep, ...]) -> ShownTest:
    tried, *later = _TITLES[len(done) :]
    return ShownTest(steps=(*done, ShownStep(title=tried, state="busy"), *(ShownStep(title=title, state="idle") for title in later)))


def _ended(at: int, message: str) -> ShownTest:
    rest = tuple(ShownStep(title=title, state="idle") for title in _TITLES[at + 1 :])
    return ShownTest(steps=(*_good(at), ShownStep(title=_TITLES[at], state="bad", message=message), *rest))


def _listing(result: StepResult) -> ShownStep:
    names = _names(result)
    if not names:
        return ShownStep(title=_TITLES[4], state="warn", message="The server lists no models. Load one first.")
    if result.outcome is Outcome.DOUBTFUL:
        return ShownStep(
            title=_TITLES[4], state="warn", message=f"The server does not list {result.model}. Choose one of its models below."
        )
    return ShownStep(title=_TITLES[4], state="good", message="1 model found." if len(names) == 1 else f"{len(names)} models found.")


def _chat(taken: StepResult) -> ShownStep:
    result = taken.result
    if taken.outcome is Outcome.PASSED and result is not None:
        message = "does not chat, which is normal for an embedding model." if result.lacks_chat else "answers."
        return ShownStep(title=_TITLES[5], state="good", message=f"{taken.model} {message}")
    if result is not None:
        message = _reason(taken)
    elif taken.problem is ProbeProblem.TIMEOUT:
        message = f"No answer within {CHAT_SECONDS:g} seconds. Is the model still loading?"
    else:
        message = "The connection broke before an answer came. Is the model still loading?"
    return ShownStep(title=_TITLES[5], state="warn", message=message)
