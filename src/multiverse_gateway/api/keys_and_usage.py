"""The admin API of client keys, owner tokens and usage counts."""

from collections.abc import Sequence

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.accounts import renew_owner_token, usage_summary
from multiverse_gateway.api.endpoints import ApiRoute, Call, body_of, json_response
from multiverse_gateway.api.key_records import KeyRecord, MadeKey, key_record, made_key
from multiverse_gateway.api.request_reading import parse_key_change, parse_new_key, read_query, selection_of
from multiverse_gateway.api.request_types import KeyChange, NewKey, UsageQuery
from multiverse_gateway.api.response_types import (
    OwnerToken,
    UsageRecord,
    UsageReport,
    usage_report,
)
from multiverse_gateway.core.errors import KeyNotFound, ServerNotFound, StorageUnavailable
from multiverse_gateway.core.key_names import nth_secret
from multiverse_gateway.core.servers import ClientKey
from multiverse_gateway.core.spreadsheets import csv_of
from multiverse_gateway.core.usage import Counts
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.issued_keys import all_keys, change_key, create_key, new_seed, renew_key, revoke_key
from multiverse_gateway.registration import refresh_if_possible, server_id_of

_CSV = {
    "text/csv": "day,model,server,owner,client,client_id,requests,failed,prompt_tokens,completion_tokens,canceled\r\n"
    "2026-05-01,llama-3.2:3b,,,alice,,42,1,1200,3400,2\r\n"
}


def key_records(gateway: Gateway) -> list[KeyRecord]:
    """Return the records of all client keys, the newest first."""
    return [record_of_key(gateway, key) for key in all_keys(gateway)]


def record_of_key(gateway: Gateway, key: ClientKey) -> KeyRecord:
    """Return the record of a client key, with its requests of today."""
    wall = gateway.wall()
    return key_record(key, wall, gateway.usage_book.day_counts.total(key.id, wall))


def usage_csv(rows: Sequence[UsageRecord]) -> str:
    """Return rows as CSV with a head."""
    columns = ("day", "model", "server", "owner", "client", "client_id", *(field.name for field in attrs.fields(Counts)))
    return csv_of([columns, *([getattr(row, name) for name in columns] for row in rows)])


def account_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of client keys, owner tokens and usage."""

    async def list_keys(request: Request) -> Response:
        """List the client keys, newest first, including expired and revoked ones. The keys' secrets are never returned."""
        await refresh_if_possible(gateway)
        return json_response(key_records(gateway))

    async def post_key(request: Request) -> Response:
        """Create a client key. Its secret is returned only here."""
        name, terms = parse_new_key(await body_of(request, gateway))
        key, secret = await create_key(gateway, name, terms)
        return json_response(made_key(key, gateway.wall(), secret), 201)

    async def patch_key(request: Request) -> Response:
        """Change a client key. Only the fields in the body change; other gateways apply the change within two seconds."""
        change = parse_key_change(await body_of(request, gateway))
        key = await change_key(
            gateway, request.path_params["key_id"], change.terms, named=change.named, name=change.name, is_blocked=change.is_blocked
        )
        return json_response(record_of_key(gateway, key))

    async def renew(request: Request) -> Response:
        """Renew a client key. Its new secret is returned only here; its name, limits and usage counts stay.

        This gateway rejects the old key as soon as the call returns, other gateways within two seconds.
        """
        seed = new_seed()
        key = await renew_key(gateway, request.path_params["key_id"], seed)
        return json_response(made_key(key, gateway.wall(), nth_secret(seed, 0)))

    async def delete_key(request: Request) -> Response:
        """Revoke a client key. This gateway rejects it as soon as the call returns, other gateways within two seconds."""
        key = await revoke_key(gateway, request.path_params["key_id"])
        return json_response(record_of_key(gateway, key))

    async def post_token(request: Request) -> Response:
        """Create a new owner token for a server. It is returned only here, and replaces the previous token."""
        server_id = server_id_of(request.path_params["server_id"])
        return json_response(OwnerToken(registration_id=server_id, owner_token=await renew_owner_token(gateway, server_id)))

    async def usage(request: Request) -> Response:
        """Report requests, failed and canceled requests, and tokens by day, model, server, owner and client key.

        With `format=csv` the answer is a table for spreadsheets.
        """
        query = read_query(request.query_params, UsageQuery)
        report = usage_report(await usage_summary(gateway, selection_of(query)))
        if query.format == "json":
            return json_response(report)
        name = f"usage-{report.since}-{report.until}.csv"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(usage_csv(report.rows), headers=headers, media_type="text/csv")

    return [
        ApiRoute(
            "/admin/keys",
            GET=Call(endpoint=list_keys, answers={200: list[KeyRecord]}),
            POST=Call(endpoint=post_key, body=NewKey, answers={201: MadeKey}, errors=(StorageUnavailable,)),
        ),
        ApiRoute(
            "/admin/keys/{key_id}",
            PATCH=Call(endpoint=patch_key, body=KeyChange, answers={200: KeyRecord}, errors=(KeyNotFound, StorageUnavailable)),
            DELETE=Call(endpoint=delete_key, answers={200: KeyRecord}, errors=(KeyNotFound, StorageUnavailable)),
        ),
        ApiRoute(
            "/admin/keys/{key_id}/renew",
            POST=Call(endpoint=renew, answers={200: MadeKey}, errors=(KeyNotFound, StorageUnavailable)),
        ),
        ApiRoute(
            "/admin/servers/{server_id}/owner-token",
            POST=Call(endpoint=post_token, answers={200: OwnerToken}, errors=(ServerNotFound, StorageUnavailable)),
        ),
        ApiRoute(
            "/admin/usage",
            GET=Call(
                endpoint=usage, query=UsageQuery, answers={200: (UsageReport, "text/csv")}, examples=_CSV, errors=(StorageUnavailable,)
            ),
        ),
    ]
