"""The engines that the operator's pages look for on the gateway's own computer, and what is offered of them.

1. Only the loopback address and the ports in `ENGINES` are looked at; nothing that a request says adds another one.
2. What a program at such a port answers is hostile input: names that no model may have are left out.
"""

from collections.abc import Collection, Iterable, Mapping

import attrs

from multiverse_gateway.core.addresses import LOCAL_HOST, EndpointError, names_this_computer, parse_endpoint
from multiverse_gateway.core.servers import MODEL_NAME, Server, model_key

MAX_OFFERED = 100
"""Models of one engine that are offered; the rest can be registered one by one."""


@attrs.frozen
class LocalEngine:
    """An engine and the port that it listens on unless its user changes that; other programs use the port too if `is_shared`."""

    name: str
    port: int
    is_shared: bool = False

    @property
    def address(self) -> str:
        """Return the address and port that are opened for a server of this engine (`core.addresses.with_opening`)."""
        return f"{LOCAL_HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Return the root URL of the engine's API."""
        return f"http://{self.address}"


ENGINES = (LocalEngine("Ollama", 11434), LocalEngine("LM Studio", 1234), LocalEngine("llama.cpp", 8080, is_shared=True))
"""The engines that are looked for, at the ports that their documentation names."""

_BY_OWNER: Mapping[str, str] = {"library": "Ollama", "organization_owner": "LM Studio", "llamacpp": "llama.cpp", "vllm": "vLLM"}
"""What engines write into `owned_by` of their models."""
_GATEWAY = "multiverse-gateway"


@attrs.frozen(kw_only=True)
class FoundEngine:
    """An engine that answered, and the models that it lists; `name` is what to call it."""

    engine: LocalEngine
    name: str
    models: tuple[str, ...]


def found_engine(engine: LocalEngine, models: Iterable[str], owned_by: str | None) -> FoundEngine | None:
    """Return the engine that answered with a list of models, or `None` if what answered is another gateway.

    >>> found_engine(ENGINES[0], ["llama3.2:3b", "<b>"], "library")
    FoundEngine(engine=LocalEngine(name='Ollama', port=11434, is_shared=False), name='Ollama', models=('llama3.2:3b',))
    """
    if owned_by == _GATEWAY:
        return None
    name = _BY_OWNER.get(owned_by or "", "a model server" if engine.is_shared else engine.name)
    usable = [model for model in dict.fromkeys(models) if MODEL_NAME.fullmatch(model)]
    return FoundEngine(engine=engine, name=name, models=tuple(usable[:MAX_OFFERED]))


@attrs.frozen(kw_only=True)
class Offer:
    """What the operator is offered of an engine; `is_empty` says that it has no model at all, so that one must be loaded first."""

    engine: LocalEngine
    name: str
    models: tuple[str, ...]
    is_empty: bool = False


def offers_of(found: Iterable[FoundEngine], servers: Collection[Server]) -> tuple[Offer, ...]:
    """Return what is offered of the engines that were found: the models that are not registered at their port yet, by whatever name."""
    registered = {(model_key(server.model_name), port) for server in servers if (port := _local_port(server)) is not None}
    offers = []
    for item in found:
        models = tuple(model for model in item.models if (model_key(model), item.engine.port) not in registered)
        if models or not item.models:
            offers.append(Offer(engine=item.engine, name=item.name, models=models, is_empty=not item.models))
    return tuple(offers)


def _local_port(server: Server) -> int | None:
    """Return the port of a server on the gateway's own computer."""
    try:
        endpoint = parse_endpoint(server.endpoint_url)
    except EndpointError:  # an older version accepted it
        return None
    return endpoint.port if names_this_computer(endpoint.host) else None
