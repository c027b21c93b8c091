"""What clients of a model may rely on."""

from __future__ import annotations

from multiverse_gateway.core.engine_facts import UNKNOWN, Abilities, EngineKind, Measured, ModelFacts
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.promises import Promise, promise_of, together
from multiverse_gateway.core.routing import build_table
from multiverse_gateway.core.servers import Capabilities, Server, ServerId


def promise(*servers: tuple[int | None, Measured | None, HealthState]) -> Promise:
    registered = [
        Server(
            id=ServerId(str(number)),
            model_name="llama",
            endpoint_url=f"http://{number}",
            capabilities=Capabilities(context_length=declared),
            registered_at=0,
            created_at=0,
            updated_at=0,
        )
        for number, (declared, _, _) in enumerate(servers)
    ]
    health = {ServerId(str(number)): Health(state=state, measured=measured) for number, (_, measured, state) in enumerate(servers)}
    return promise_of(build_table(1, registered, health).models["llama"])


def test_every_active_server_counts_with_its_smaller_promise() -> None:
    well = HealthState.HEALTHY
    big = Measured(kind=EngineKind.VLLM, model=ModelFacts(name="llama", context=16384))
    small = Measured(kind=EngineKind.OLLAMA, model=ModelFacts(name="llama", context=4096, trained_context=131072))
    assert promise((None, big, well), (None, small, well)) == Promise(
        context_length=4096, largest_context_length=16384, trained_context_length=131072
    )
    assert promise((2048, big, well)) == Promise(context_length=2048, largest_context_length=2048)
    assert promise((2048, None, well), (None, Measured(kind=EngineKind.OTHER), well)) == Promise(context_length=2048)
    assert promise((None, big, well), (1024, small, HealthState.DEACTIVATED)) == Promise(context_length=16384, largest_context_length=16384)


def test_one_server_that_can_is_enough_and_only_all_that_cannot_are_a_no() -> None:
    assert together([Abilities(tools=True), Abilities(tools=False), UNKNOWN]).tools is True
    assert together([Abilities(tools=False), UNKNOWN]).tools is None
    assert together([Abilities(tools=False), Abilities(tools=False)]).tools is False
    assert together([]) == UNKNOWN
