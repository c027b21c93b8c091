"""The page about client keys, and the part of others about what was used."""

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.accounts import usage_summary
from multiverse_gateway.api.key_records import MadeKey, made_key
from multiverse_gateway.api.keys_and_usage import key_records
from multiverse_gateway.api.request_reading import parse_new_key
from multiverse_gateway.api.response_types import usage_report
from multiverse_gateway.core.errors import BadRequest, GatewayError
from multiverse_gateway.core.servers import KeyTerms
from multiverse_gateway.core.usage_reports import UsageSelection, UsageSummary
from multiverse_gateway.issued_keys import create_key, revoke_key
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.server_form import Form, message_of
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.registration import refresh_if_possible

LIMITS = ("rate_limit", "daily_limit", "max_at_once")
FIELDS = ("name", "days", *LIMITS, "bulk", "models")
MAX_DAYS = 36_500
MOST_ROWS = 31
"""How many rows of use a page shows: each day of the month by day, or what is used most."""


class ClientKeys:
    """Who may use the models."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of these pages."""
        return [
            Route("/keys", sign_in.operators(self._keys), methods=["GET", "POST"], name="ui:keys"),
            Route("/keys/{key_id}/revoke", sign_in.operators(self._revoke), methods=["POST"], name="ui:revoke_key"),
        ]

    async def _keys(self, visit: Visit) -> Response:
        if visit.request.method == "GET":
            return await self._page(visit)
        try:
            key, secret = await create_key(self._gateway, *self._wanted(visit.form))
        except GatewayError as error:
            return await self._page(visit, problem=message_of(error), status=error.status)
        return await self._page(visit, made=made_key(key, self._gateway.wall(), secret))

    async def _page(self, visit: Visit, *, made: MadeKey | None = None, problem: str = "", status: int = 200) -> Response:
        await refresh_if_possible(self._gateway)
        return self._renderer.page(
            visit,
            "keys.html",
            status=status,
            active="keys",
            keys=key_records(self._gateway),
            made=made,
            problem=problem,
            given={name: visit.form.get(name, "") if problem else "" for name in FIELDS},
            required=self._gateway.settings.require_client_auth,
        )

    def _wanted(self, form: Form) -> tuple[str, KeyTerms]:
        body: dict[str, Any] = {"name": form.get("name", "").strip()}
        days = _number(form, "days")
        if days is not None:
            if not 1 <= days <= MAX_DAYS:
                raise BadRequest(f"The days until it expires must be a whole number from 1 to {MAX_DAYS:,}", param="days")
            body["expires_at"] = (datetime.fromtimestamp(self._gateway.wall(), UTC) + timedelta(days=days)).isoformat()
        body |= {name: _number(form, name) for name in LIMITS}
        body["bulk"] = bool(form.get("bulk"))
        body["models"] = [name.strip() for name in form.get("models", "").split(",") if name.strip()]
        return parse_new_key(body)

    async def _revoke(self, visit: Visit) -> Response:
        key = await revoke_key(self._gateway, visit.request.path_params["key_id"])
        return self._renderer.done(visit, "success", f"The key of {key.name} is revoked.", "keys")


def _number(form: Form, name: str) -> int | None:
    text = form.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"{name.replace('_', ' ')} must be a whole number", param=name)
    return int(text)


async def usage_values(renderer: Renderer, visit: Visit, by: str, server: str | None = None) -> dict[str, Any]:
    """Return what `_usage.html` shows: the use of the last days by day, model or another part, and where the whole table is.

    Of more rows than `MOST_ROWS` those with the most requests are shown.
    """
    try:
        summary = await usage_summary(renderer.gateway, UsageSelection(by=frozenset({by}), server=server))
    except GatewayError:
        summary = UsageSummary()
    root = str(visit.request.scope.get("root_path", "")).rstrip("/")
    query = urlencode({"format": "csv"} | ({"server": server} if server else {}))
    report = usage_report(summary)
    rows = report.rows
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: row.requests, reverse=True)[:MOST_ROWS]
    return {"usage": rows, "usage_total": len(report.rows), "by": by, "csv": f"{root}/admin/usage?{query}"}
