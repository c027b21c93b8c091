"""The page of the settings: what they mean in words first, then each with its value, and the export of the registry."""

import re
from typing import Any

import anyio
import attrs
from markupsafe import Markup, escape
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.endpoints import json_response
from multiverse_gateway.api.exports import export_of
from multiverse_gateway.api.response_types import iso
from multiverse_gateway.pages.first_steps import FirstSteps
from multiverse_gateway.pages.plain_settings import access_answer, limits_answer, networks_answer
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.sign_in import SignIn, WrongKey
from multiverse_gateway.registration import export_registry, refresh_if_possible

EXPORT_NAME = "multiverse-servers.json"

_QUOTED = re.compile(r"`([^`]*)`")


class SettingsPage:
    """What this gateway runs with."""

    def __init__(self, renderer: Renderer, sign_in: SignIn, first_steps: FirstSteps) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway
        self._sign_in = sign_in
        self._first_steps = first_steps

    def routes(self) -> list[Route]:
        """Return the routes of this page."""
        page = self._sign_in.operators
        return [
            Route("/settings", page(self._settings), name="ui:settings"),
            Route("/settings/export", page(self._export), methods=["GET", "POST"], name="ui:export"),
        ]

    async def _export(self, visit: Visit) -> Response:
        """Hand out the registry with the servers' keys to an operator who types the admin key once more: a session is not enough."""
        if visit.request.method != "POST":
            return self._renderer.redirect(visit.request, "settings")
        wrong = self._sign_in.judge_key(visit.request, visit.form.get("key", ""))
        if wrong is not None:
            return await self._settings(visit, wrong)
        await refresh_if_possible(self._gateway)
        registry = await export_registry(self._gateway, include_keys=True)
        response = json_response(export_of(registry, wall=self._gateway.wall(), include_keys=True))
        response.headers["content-disposition"] = f'attachment; filename="{EXPORT_NAME}"'
        response.headers["cache-control"] = "no-store"
        return response

    async def _settings(self, visit: Visit, wrong: WrongKey | None = None) -> Response:
        settings = self._gateway.settings
        await refresh_if_possible(self._gateway)
        working = sum(key.works(self._gateway.wall()) for key in self._gateway.registrations.keys.values())
        opened = [route.server.opened_address for route in self._gateway.table.routes.values() if route.server.opened_address]
        response = self._renderer.page(
            visit,
            "settings.html",
            status=200 if wrong is None else wrong.status,
            active="settings",
            wrong=wrong,
            shown=self._shown(),
            reach=self._first_steps.reach(visit),
            answers=(
                access_answer(settings, keys=working + len(settings.client_api_keys)),
                networks_answer(settings, opened=opened if self._gateway.network.address_policy.honors_openings else ()),
                limits_answer(settings),
            ),
            database=await _database(settings.database_url),
            started_at=iso(self._gateway.usage_book.started_at),
            uptime=self._gateway.wall() - self._gateway.usage_book.started_at,
            totals=self._gateway.usage_book.totals,
        )
        if wrong is not None and wrong.wait:
            response.headers["retry-after"] = str(wrong.wait)
        return response

    def _shown(self) -> list[dict[str, Any]]:
        settings = self._gateway.settings
        fields = attrs.fields_dict(type(settings))
        usual = type(settings)()
        shown = [
            {
                "name": f"MULTIVERSE_{name.upper()}",
                "value": written(value),
                "description": with_code(fields[name].metadata["description"]),
                "is_set": getattr(settings, name) != getattr(usual, name),
            }
            for name, value in settings.masked().items()
        ]
        if settings.admin_api_key is None:
            (admin,) = (item for item in shown if item["name"] == "MULTIVERSE_ADMIN_API_KEY")
            admin["value"] = "in force (made at first start)"
        return shown


def with_code(text: str) -> Markup:
    """Return a text of the documentation as HTML: what stands between back-ticks is code.

    >>> with_code("made with `keys create` & more")
    Markup('made with <code>keys create</code> &amp; more')
    """
    return Markup(_QUOTED.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704  escaped before


def written(value: object) -> str:
    """Return a value as the page and the log show it."""
    if value is None or value == () or value == "":
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


async def _database(url: str) -> dict[str, Any]:
    """Return where the registry is stored and its size; the address of a database server is left out."""
    scheme, _, rest = url.partition("://")
    if scheme != "sqlite":
        return {"kind": scheme, "path": None, "bytes": None}
    path = anyio.Path(rest.removeprefix("/"))
    try:
        taken = (await path.stat()).st_size
    except OSError:
        return {"kind": "SQLite", "path": str(path), "bytes": None}
    return {"kind": "SQLite", "path": str(await path.absolute()), "bytes": taken}
