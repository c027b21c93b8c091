"""What clients of a model may rely on, made of what its servers state and of what was measured at them."""

from collections.abc import Iterable

from attrs import fields, frozen

from multiverse_gateway.core.engine_facts import UNKNOWN, Abilities, Measured
from multiverse_gateway.core.needs import context_of
from multiverse_gateway.core.routing import Model
from multiverse_gateway.core.servers import Server


@frozen(kw_only=True)
class Promise:
    """What the active servers of a model offer together; `None` is what is not known.

    Each of them has room for `context_length` tokens, as it was measured or, where that is unknown, stated. One of them has room for
    `largest_context_length`, as it was measured. `trained_context_length` is the largest number that the model was made for.
    """

    context_length: int | None = None
    largest_context_length: int | None = None
    trained_context_length: int | None = None
    abilities: Abilities = UNKNOWN


def promise_of(model: Model) -> Promise:
    """Return what the active servers of a model offer together.

    >>> from multiverse_gateway.core.routing import build_table
    >>> server = Server(id="a", model_name="llama", endpoint_url="http://a", registered_at=0, created_at=0, updated_at=0)
    >>> promise_of(build_table(1, [server], {}).models["llama"]) == Promise()
    True
    """
    active = [(route.server, route.health.measured) for route in model.routes if route.health.is_active]
    promised = [context for server, measured in active if (context := promised_context(server, measured)) is not None]
    measured_contexts = [context for server, measured in active if (context := context_of(server, measured)) is not None]
    known = [measured.model for _, measured in active if measured is not None and measured.model is not None]
    trained = [facts.trained_context for facts in known if facts.trained_context is not None]
    return Promise(
        context_length=min(promised, default=None),
        largest_context_length=max(measured_contexts, default=None),
        trained_context_length=max(trained, default=None),
        abilities=together([UNKNOWN if measured is None else measured.abilities for _, measured in active]),
    )


def promised_context(server: Server, measured: Measured | None) -> int | None:
    """Return how many tokens a server has room for: the smaller of what was measured and what its registration states."""
    context = context_of(server, measured)
    return server.capabilities.context_length if context is None else context


def together(abilities: Iterable[Abilities]) -> Abilities:
    """Return what several servers can do together: true if one of them can, false if none can.

    >>> together([Abilities(tools=False, vision=False), Abilities(tools=True)]).tools
    True
    """
    every = list(abilities)
    return Abilities(**{field.name: _either([getattr(each, field.name) for each in every]) for field in fields(Abilities)})


def _either(answers: list[bool | None]) -> bool | None:
    if True in answers:
        return True
    return False if answers and None not in answers else None
