"""The pages of client keys: make, find, change, block, renew and revoke them."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import attrs
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.admin_key import key_digest
from multiverse_gateway.core.errors import GatewayError, KeyNameTaken
from multiverse_gateway.core.key_names import MAX_KEY_NAME
from multiverse_gateway.core.servers import KeyTerms
from multiverse_gateway.core.spreadsheets import csv_of
from multiverse_gateway.issued_keys import change_key, create_keys, find_key, new_seed, renew_key, revoke_key
from multiverse_gateway.pages.key_form import (
    LIMITS,
    MAX_NAMES,
    changes_in,
    message_of,
    models_in,
    names_in,
    new_terms,
    pick_list,
    values_of,
)
from multiverse_gateway.pages.key_views import KeyRow, rows_of, searched
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.sealed_keys import MadeKeys, SealedKeys
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.pages.snippets import handout_of
from multiverse_gateway.pages.words import count, listed
from multiverse_gateway.registration import refresh_if_possible

TYPED = ("names", "days", *LIMITS, "bulk", "which")
_ASKS = {"renew": "renew", "block": "block", "revoke": "revoke"}
"""What a page asks about before it is done, by the last part of its path."""


@attrs.frozen
class ShownKey:
    """A key as its page shows it, once."""

    id: str
    name: str
    secret: str = attrs.field(repr=False)


class KeyPages:
    """Who may use the models."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway
        self._sealed = SealedKeys(renderer)

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of these pages."""
        page = sign_in.operators
        return [
            Route("/keys", page(self._keys), methods=["GET", "POST"], name="ui:keys"),
            Route("/keys/{key_id}", page(self._key), methods=["GET", "POST"], name="ui:key"),
            Route("/keys/{key_id}/new", page(self._new), name="ui:new_key"),
            Route("/keys/{key_id}/unblock", page(self._unblock), methods=["POST"], name="ui:unblock_key"),
            Route("/keys/{key_id}/block", page(self._block), methods=["GET", "POST"], name="ui:block_key"),
            Route("/keys/{key_id}/renew", page(self._renew), methods=["GET", "POST"], name="ui:renew_key"),
            Route("/keys/{key_id}/revoke", page(self._revoke), methods=["GET", "POST"], name="ui:revoke_key"),
        ]

    # All keys

    async def _keys(self, visit: Visit) -> Response:
        if visit.request.method != "POST":
            return await self._page(visit)
        try:
            names, terms = names_in(visit.form), new_terms(visit.form, self._gateway.wall())
            return await self._make(visit, names, terms)
        except GatewayError as error:
            return await self._page(visit, problem=message_of(error), status=error.status)

    async def _make(self, visit: Visit, names: Sequence[str], terms: KeyTerms) -> Response:
        seed = new_seed()
        made = await create_keys(self._gateway, names, terms, seed)
        if not made:
            if len(names) == 1:
                raise KeyNameTaken(names[0])
            return await self._page(visit, problem="All these names have a key already. No key was made.", status=400)
        made_names = {key.name for key in made}
        left_out = [name for name in names if name not in made_names]
        note = f"{count(len(made), 'key')} created. Left out, because they have a key already: {listed(left_out, 5)}." if left_out else ""
        return await self._hand_over(visit, MadeKeys(key_id=made[0].id, seed=seed, count=len(made)), note)

    async def _hand_over(self, visit: Visit, made: MadeKeys, note: str = "") -> Response:
        """Go to the page that shows the keys: a reload there sends no form again."""
        path = self._renderer.url(visit.request, "new_key", key_id=made.key_id)
        response = self._renderer.redirect(visit.request, "new_key", key_id=made.key_id)
        response.headers.append("set-cookie", await self._sealed.seal(visit, made, path))
        if note and visit.session is not None:
            response.headers.append("set-cookie", visit.session.note("warning", note))
        return response

    async def _page(self, visit: Visit, *, problem: str = "", status: int = 200) -> Response:
        await refresh_if_possible(self._gateway)
        wanted = visit.query.get("q", "")
        rows = await rows_of(self._gateway)
        shown = searched(rows, wanted) if wanted.strip() else rows
        given = {name: visit.form.get(name, "") if problem else "" for name in TYPED}
        settings = self._gateway.settings
        return self._renderer.page(
            visit,
            "keys.html",
            status=status,
            active="keys",
            wanted=wanted,
            total=len(rows),
            rows=[row for row in shown if not row.is_over],
            over=[row for row in shown if row.is_over],
            problem=problem,
            given=given,
            pick=self._pick(models_in(visit.form) if problem else ()),
            required=settings.require_client_auth,
            address_limit=settings.rate_limit_per_minute,
            key_limit=settings.key_rate_limit_per_minute,
            default_at_once=settings.max_at_once_per_key,
            most_names=MAX_NAMES,
        )

    def _pick(self, chosen: Sequence[str]) -> tuple[list[tuple[str, bool]], str]:
        names = sorted((model.name for model in self._gateway.table.models.values()), key=lambda name: (name.casefold(), name))
        return pick_list(names, chosen)

    # One key

    async def _key(self, visit: Visit) -> Response:
        row = await self._row(visit)
        if visit.request.method != "POST":
            return self._key_page(visit, row)
        try:
            changes, labels = changes_in(visit.form, row.record)
            if labels:
                await change_key(self._gateway, row.record.id, changes.terms, named=changes.named, name=changes.name)
        except GatewayError as error:
            return self._key_page(visit, row, problem=message_of(error), status=error.status)
        message = f"Saved: {', '.join(labels)}." if labels else "Nothing was changed."
        return self._renderer.done(visit, "success" if labels else "info", message, "key", key_id=row.record.id)

    async def _row(self, visit: Visit) -> KeyRow:
        await refresh_if_possible(self._gateway)
        key = find_key(self._gateway, visit.request.path_params["key_id"])
        return (await rows_of(self._gateway, key_id=key.id))[0]

    def _key_page(self, visit: Visit, row: KeyRow, *, problem: str = "", status: int = 200) -> Response:
        record, form = row.record, visit.form
        values: Mapping[str, Any] = {name: "" if value is None else value for name, value in values_of(record).items()}
        values = {**values, "expires_on": (record.expires_at or "")[:10], "which": "some" if record.models else "all"}
        if problem:
            values = {**values, **{name: form.get(name, "") for name in ("name", "expires_on", *LIMITS, "bulk", "which")}}
        return self._renderer.page(
            visit,
            "key.html",
            status=status,
            active="keys",
            row=row,
            key=record,
            values=values,
            pick=self._pick(models_in(form) if problem else record.models),
            problem=problem,
            longest_name=MAX_KEY_NAME,
            key_limit=self._gateway.settings.key_rate_limit_per_minute,
            default_at_once=self._gateway.settings.max_at_once_per_key,
            required=self._gateway.settings.require_client_auth,
        )

    async def _ask(self, visit: Visit) -> Response:
        """Ask whether to go on: what the dialog on the page of the key asks, for browsers without scripts."""
        row = await self._row(visit)
        return self._renderer.page(
            visit,
            "confirm_key.html",
            active="keys",
            key=row.record,
            act=_ASKS[visit.request.url.path.rpartition("/")[2]],
            required=self._gateway.settings.require_client_auth,
        )

    async def _revoke(self, visit: Visit) -> Response:
        if visit.request.method != "POST":
            return await self._ask(visit)
        key = await revoke_key(self._gateway, visit.request.path_params["key_id"])
        return self._renderer.done(visit, "success", f"The key of {key.name} is revoked.", "keys")

    async def _block(self, visit: Visit) -> Response:
        if visit.request.method != "POST":
            return await self._ask(visit)
        return await self._set_blocked(visit, is_blocked=True)

    async def _unblock(self, visit: Visit) -> Response:
        return await self._set_blocked(visit, is_blocked=False)

    async def _set_blocked(self, visit: Visit, *, is_blocked: bool) -> Response:
        key = await change_key(self._gateway, visit.request.path_params["key_id"], KeyTerms(), named=(), is_blocked=is_blocked)
        message = f"The key of {key.name} is {'blocked' if is_blocked else 'active again'}."
        return self._renderer.done(visit, "success", message, "key", key_id=key.id)

    async def _renew(self, visit: Visit) -> Response:
        if visit.request.method != "POST":
            return await self._ask(visit)
        seed = new_seed()
        key = await renew_key(self._gateway, visit.request.path_params["key_id"], seed)
        return await self._hand_over(visit, MadeKeys(key_id=key.id, seed=seed))

    # New keys

    async def _new(self, visit: Visit) -> Response:
        """Show keys that were made a moment ago, the first time only; a browser that fetches pages in advance sees none."""
        request = visit.request
        row = await self._row(visit)
        is_shown = request.method == "GET" and "prefetch" not in request.headers.get("sec-purpose", "")
        made = await self._sealed.open(visit, row.record.id) if is_shown else None
        keys = [] if made is None else self._found(made)
        base_url = f"{self._renderer.base_url(request)}/v1"
        table = _table(keys, base_url)
        response = self._renderer.page(
            visit,
            "new_keys.html",
            active="keys",
            key=row.record,
            keys=keys,
            base_url=base_url,
            handout=handout_of(base_url, keys[0].secret, self._example_model(row)) if keys else "",
            table=table,
            download=f"data:text/csv;charset=utf-8,{quote(table)}",
        )
        if is_shown:
            response.headers.append("set-cookie", self._sealed.end(visit, self._renderer.url(request, "new_key", key_id=row.record.id)))
        return response

    def _found(self, made: MadeKeys) -> list[ShownKey]:
        """Return the keys that are still the ones that were made: another operator may have renewed one since."""
        known = self._gateway.registrations.keys
        found = ((known.get(key_digest(secret)), secret) for secret in made.secrets)
        return [ShownKey(key.id, key.name, secret) for key, secret in found if key is not None]

    def _example_model(self, row: KeyRow) -> str:
        """Return a model that the code of the page asks for: one that the key may use."""
        names = row.record.models or [model.name for model in self._gateway.table.models.values()]
        return names[0] if names else "MODEL"


def _table(keys: Sequence[ShownKey], base_url: str) -> str:
    return csv_of([("name", "OPENAI_BASE_URL", "OPENAI_API_KEY"), *((key.name, base_url, key.secret) for key in keys)])
