"""The calls about hosts: one engine on one computer each, with all its models."""

from typing import Annotated

import attrs
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.endpoints import ApiRoute, Call, body_of, json_response
from multiverse_gateway.api.request_reading import parse_host_change
from multiverse_gateway.api.request_types import HostFields
from multiverse_gateway.api.response_types import Status, Time, Uuid, iso
from multiverse_gateway.core.errors import ModelNotOffered, ProbeRefused, StorageUnavailable
from multiverse_gateway.core.hosts import Host, HostNotFound
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.host_book import change_host, find_host, remove_host
from multiverse_gateway.registration import refresh_if_possible


@attrs.frozen(kw_only=True)
class HostServer:
    """A model that a host offers: a server of the registry."""

    registration_id: Uuid
    model_name: str
    upstream_model: str | None
    health_status: Status
    state: str
    max_concurrency: Annotated[int | None, Meta(description="its own limit; the host's holds for all its servers together")]
    in_flight: int


@attrs.frozen(kw_only=True)
class HostRecord:
    """A host and its servers. The API key is never included, only whether one is stored."""

    id: str
    endpoint_url: str
    owner: str | None
    has_api_key: bool
    max_concurrency: Annotated[int | None, Meta(description="the most requests that run on all its servers at once; null for no limit")]
    in_flight: Annotated[int, Meta(description="requests of this process that run on its servers")]
    created_at: Time
    updated_at: Time
    servers: list[HostServer]


@attrs.frozen(kw_only=True)
class RemovedHost:
    """Confirmation that a host was removed, with the servers that were removed with it."""

    id: str
    registration_ids: list[Uuid]


def host_record(gateway: Gateway, host: Host) -> HostRecord:
    """Return the record of a host."""
    return HostRecord(
        id=host.id,
        endpoint_url=host.endpoint_url,
        owner=host.owner,
        has_api_key=host.api_key is not None,
        max_concurrency=host.max_concurrency,
        in_flight=gateway.load.host_in_flight(host.id),
        created_at=iso(host.created_at),
        updated_at=iso(host.updated_at),
        servers=[
            HostServer(
                registration_id=route.server.id,
                model_name=route.server.model_name,
                upstream_model=route.server.upstream_model,
                health_status=route.health.status,
                state=route.health.state.value,
                max_concurrency=route.server.max_concurrency,
                in_flight=gateway.load.in_flight(route.server.id),
            )
            for route in gateway.table.routes_of(host.id)
        ],
    )


def host_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of hosts."""

    async def list_hosts(request: Request) -> Response:
        """List the hosts with their servers, the oldest first."""
        await refresh_if_possible(gateway)
        hosts = sorted(gateway.table.hosts.values(), key=lambda host: (host.created_at, host.id))
        return json_response([host_record(gateway, host) for host in hosts])

    async def one_host(request: Request) -> Response:
        """Return a host with its servers."""
        await refresh_if_possible(gateway)
        return json_response(host_record(gateway, find_host(gateway, request.path_params["host_id"])))

    async def put_host(request: Request) -> Response:
        """Change a host with all its servers. A new URL or API key is probed first; if the probe fails, nothing changes.

        A new limit holds at once: waiting requests start if it allows more, and requests that run end as usual if it allows fewer. Servers
        that had the limit of the host get the new one; those with a limit of their own keep it.
        """
        host = find_host(gateway, request.path_params["host_id"])
        await change_host(gateway, host.id, parse_host_change(await body_of(request, gateway)))
        return json_response(host_record(gateway, find_host(gateway, host.id)))

    async def delete_host(request: Request) -> Response:
        """Remove a host with all its servers. Once this call returns, they get no new requests."""
        host = find_host(gateway, request.path_params["host_id"])
        server_ids: list[str] = [route.server.id for route in gateway.table.routes_of(host.id)]
        await remove_host(gateway, host.id)
        return json_response(RemovedHost(id=host.id, registration_ids=server_ids))

    changing = (HostNotFound, ModelNotOffered, ProbeRefused, StorageUnavailable)
    return [
        ApiRoute("/admin/hosts", GET=Call(endpoint=list_hosts, answers={200: list[HostRecord]})),
        ApiRoute(
            "/admin/hosts/{host_id}",
            GET=Call(endpoint=one_host, answers={200: HostRecord}, errors=(HostNotFound,)),
            PUT=Call(endpoint=put_host, body=HostFields, answers={200: HostRecord}, errors=changing),
            DELETE=Call(endpoint=delete_host, answers={200: RemovedHost}, errors=(HostNotFound, StorageUnavailable)),
        ),
    ]
