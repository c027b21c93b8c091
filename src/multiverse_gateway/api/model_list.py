"""The OpenAI list of models, made from the routing table."""

from collections.abc import Sequence

from attrs import asdict
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.endpoints import ApiRoute, Call, json_response
from multiverse_gateway.api.response_types import ModelItem, ModelList, ModelServers
from multiverse_gateway.core.errors import ModelNotFound
from multiverse_gateway.core.promises import promise_of
from multiverse_gateway.core.routing import Model, close_names
from multiverse_gateway.core.servers import model_key
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.web.middleware import CALLER

OWNER = "multiverse-gateway"


def model_item(model: Model) -> ModelItem | None:
    """Return a model in OpenAI's format with the number of its servers, or `None` if no server is active.

    Any of the active servers may get a request, so the smallest context is what a client may rely on.
    """
    active = [route for route in model.routes if route.health.is_active]
    if not active:
        return None
    healthy = sum(route.health.status == "healthy" for route in active)
    promise = promise_of(model)
    return ModelItem(
        id=model.name,
        created=int(min(route.server.created_at for route in active)),
        owned_by=OWNER,
        available_servers=healthy,
        total_servers=len(active),
        multiverse=ModelServers(
            servers_healthy=healthy,
            servers_total=len(active),
            largest_context_length=_known(promise.largest_context_length),
            trained_context_length=_known(promise.trained_context_length),
            abilities={name: answer for name, answer in asdict(promise.abilities).items() if answer is not None} or UNSET,
        ),
        context_length=_known(promise.context_length),
        alias_of=[tier.name for tier in model.tiers] if model.tiers else UNSET,
    )


def _known(number: int | None) -> int | UnsetType:
    return UNSET if number is None else number


def model_items(gateway: Gateway) -> list[ModelItem]:
    """Return all models and aliases that have an active server, by name."""
    listed = {**gateway.table.models, **gateway.table.aliases}
    return [item for model in sorted(listed.values(), key=lambda model: model.name) if (item := model_item(model)) is not None]


def unknown_model(name: str, names: Sequence[str]) -> ModelNotFound:
    """Return the error for a model that no server offers, which names the available models."""
    shown = name[:128].encode(errors="replace").decode()
    close = close_names(name, names)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    listed = f"the available models are {', '.join(names[:20])}" if names else "no model is registered yet; register a server at /register"
    return ModelNotFound(f"The model {shown} is not registered; {hint}{listed}", param="model")


def may_use(request: Request, model: str) -> bool:
    """Return whether the caller may use a model: without a key, or with one that allows it."""
    caller = request.scope.get(CALLER)
    return caller is None or caller.key is None or caller.key.may_use(model)


def model_routes(gateway: Gateway) -> list[Route]:
    """Make the routes of `/v1/models`; ids may contain "/"."""

    async def list_models(request: Request) -> Response:
        """List the models that at least one server offers."""
        return json_response(ModelList(data=[item for item in model_items(gateway) if may_use(request, item.id)]))

    async def one_model(request: Request) -> Response:
        """Return one model. Its id may contain "/"."""
        name = request.path_params["model"]
        model = gateway.table.find(model_key(name))
        item = None if model is None else model_item(model)
        if item is None or not may_use(request, name):
            raise unknown_model(name, gateway.model_names())
        return json_response(item)

    return [
        ApiRoute("/v1/models", name="models_api", GET=Call(endpoint=list_models, answers={200: ModelList})),
        ApiRoute(
            "/v1/models/{model:path}", name="model_api", GET=Call(endpoint=one_model, answers={200: ModelItem}, errors=(ModelNotFound,))
        ),
    ]
