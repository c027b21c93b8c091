"""The part of the admin API about links to the wall view."""

from typing import Annotated

import attrs
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.endpoints import ApiRoute, Call, body_of, json_response
from multiverse_gateway.api.request_reading import read
from multiverse_gateway.api.request_types import KeyName
from multiverse_gateway.api.response_types import Time, Uuid, iso
from multiverse_gateway.core.errors import NotFound, StorageUnavailable
from multiverse_gateway.core.servers import WallLink
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.registration import refresh_if_possible
from multiverse_gateway.wall_links import create_wall_link, revoke_wall_link


@attrs.frozen(kw_only=True)
class NewWallLink:
    """A link to the wall view to create; `name` says which screen it is for."""

    name: KeyName


@attrs.frozen(kw_only=True)
class WallLinkRecord:
    """A link to the wall view, without its token."""

    id: Uuid
    name: str
    created_at: Time


@attrs.frozen(kw_only=True)
class MadeWallLink(WallLinkRecord):
    """A link that was just created. `path` is shown this once: append it to the gateway's address and open it on the screen."""

    path: Annotated[str, Meta(description="`/wall#` and the token, which browsers keep out of requests")] = attrs.field(repr=False)


def _record(link: WallLink) -> WallLinkRecord:
    return WallLinkRecord(id=link.id, name=link.name, created_at=iso(link.created_at))


def wall_link_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of the links to the wall view."""

    async def list_wall_links(request: Request) -> Response:
        """List the links to the wall view, the oldest first, without their tokens."""
        await refresh_if_possible(gateway)
        return json_response([_record(link) for link in gateway.registrations.registry.wall_links])

    async def post_wall_link(request: Request) -> Response:
        """Create a link to the wall view; only this response shows its token."""
        link, token = await create_wall_link(gateway, read(await body_of(request, gateway), NewWallLink).name)
        return json_response(MadeWallLink(**attrs.asdict(_record(link)), path=f"/wall#{token}"), 201)

    async def delete_wall_link(request: Request) -> Response:
        """Revoke a link to the wall view. Screens that show it lose it within a second or two, on every gateway."""
        return json_response(_record(await revoke_wall_link(gateway, request.path_params["link_id"])))

    return [
        ApiRoute(
            "/admin/wall-links",
            GET=Call(endpoint=list_wall_links, answers={200: list[WallLinkRecord]}),
            POST=Call(endpoint=post_wall_link, body=NewWallLink, answers={201: MadeWallLink}, errors=(StorageUnavailable,)),
        ),
        ApiRoute(
            "/admin/wall-links/{link_id}",
            DELETE=Call(endpoint=delete_wall_link, answers={200: WallLinkRecord}, errors=(NotFound, StorageUnavailable)),
        ),
    ]
