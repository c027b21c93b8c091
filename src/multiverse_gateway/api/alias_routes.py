"""The calls about aliases: names that stand for models."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.alias_book import remove_alias, save_alias
from multiverse_gateway.api.endpoints import ApiRoute, Call, body_of, json_response
from multiverse_gateway.api.request_reading import parse_alias
from multiverse_gateway.api.request_types import AliasChange
from multiverse_gateway.api.response_types import AliasRecord, alias_record
from multiverse_gateway.core.aliases import AliasNotFound
from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.registration import refresh_if_possible


def alias_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of aliases; their names may contain "/"."""

    async def list_aliases(request: Request) -> Response:
        """List the aliases, the oldest first."""
        await refresh_if_possible(gateway)
        return json_response([alias_record(alias) for alias in gateway.registrations.registry.aliases])

    async def put_alias(request: Request) -> Response:
        """Let a name stand for models, the preferred one first. Other gateways apply the change within two seconds.

        A request for the alias goes to the first model with a free slot, or else waits for the first one with a usable server. Its answer
        names the model in `x-multiverse-model`. An alias hides a model of the same name.
        """
        name, models = parse_alias(request.path_params["alias"], await body_of(request, gateway))
        return json_response(alias_record(await save_alias(gateway, name, models)))

    async def delete_alias(request: Request) -> Response:
        """Remove an alias; models of the same name can be used again."""
        return json_response(alias_record(await remove_alias(gateway, request.path_params["alias"])))

    return [
        ApiRoute("/admin/aliases", GET=Call(endpoint=list_aliases, answers={200: list[AliasRecord]})),
        ApiRoute(
            "/admin/aliases/{alias:path}",
            PUT=Call(endpoint=put_alias, body=AliasChange, answers={200: AliasRecord}, errors=(StorageUnavailable,)),
            DELETE=Call(endpoint=delete_alias, answers={200: AliasRecord}, errors=(AliasNotFound, StorageUnavailable)),
        ),
    ]
