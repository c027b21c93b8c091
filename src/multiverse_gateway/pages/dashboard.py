"""Dashboard and models: lists that follow what happens."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import anyio
import attrs
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.core.servers import model_key
from multiverse_gateway.pages import live, views
from multiverse_gateway.pages.dashboard_rows import DashboardRows
from multiverse_gateway.pages.first_steps import FirstSteps
from multiverse_gateway.pages.live import Followed, FollowedParts, Parts, out_of_band
from multiverse_gateway.pages.live_topics import Topic
from multiverse_gateway.pages.model_rows import ChosenModel, ModelRow, chosen_model, in_order, row_of_model
from multiverse_gateway.pages.recent_checks import RecentChecks
from multiverse_gateway.pages.rendering import Renderer, Visit
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.pages.snippets import snippets_of
from multiverse_gateway.pages.usage_page import usage_text
from multiverse_gateway.registration import refresh_if_possible

_WHOLE = {"hx-retarget": "#page", "hx-reselect": "#page"}
"""Makes HTMX take a whole page where a part of another one was asked for."""


@attrs.frozen(slots=False)
class Snapshot:
    """The rows and figures of the dashboard at one instant, as operators or visitors see them."""

    at: float
    rows: Sequence[views.Row]
    overview: views.Overview
    queues: views.Queues
    parts: dict[Hashable, Parts] = attrs.field(factory=dict)
    """The parts of the pages that showed this snapshot, by what they show of it."""

    @cached_property
    def by_model(self) -> Mapping[str, Sequence[views.Row]]:
        """Return the rows of the servers by the key of their model."""
        found: dict[str, list[views.Row]] = {}
        for row in self.rows:
            found.setdefault(model_key(row.model), []).append(row)
        return found


class Dashboard:
    """What is up, by server and by model."""

    def __init__(self, renderer: Renderer, recent_checks: RecentChecks, first_steps: FirstSteps) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway
        self._recent_checks = recent_checks
        self._first_steps = first_steps
        self._snapshots: dict[bool, Snapshot] = {}
        """What was seen last, by whether visitors see it: one tick of all live pages needs it once."""
        self._taking = anyio.Lock()
        self._rows = DashboardRows(renderer)

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of these pages."""
        return [
            Route("/dashboard", sign_in.visitors_if_public(self._dashboard), name="ui:dashboard"),
            Route("/models", sign_in.visitors_if_public(self._models), name="ui:models"),
        ]

    def topics(self) -> Mapping[str, Topic]:
        """Return what browsers can follow of these pages."""
        return {
            "dashboard": lambda visit: self._followed(visit, lambda snapshot: self._dashboard_parts(visit, snapshot)),
            "models": lambda visit: self._followed(visit, lambda snapshot: self._models_parts(visit, snapshot)),
        }

    async def _dashboard(self, visit: Visit) -> Response:
        query = views.Query.of(visit.query, public=not visit.is_operator)
        snapshot = await self._fresh_snapshot(visit)
        parts = self._dashboard_parts(visit, snapshot)
        routes = [route.server for route in self._gateway.table.routes.values()]
        values: dict[str, Any] = {
            "query": query,
            "parts": parts,
            "aside": "",
            "live": self._renderer.live("dashboard", query.pairs(), parts),
            "here": self._renderer.here(visit, "dashboard", query.pairs()),
            "sorts": {sort: self._sort_link(visit, query, sort) for sort in views.SORTS},
        }
        is_polled = visit.is_fragment and visit.request.headers.get("hx-target") == "live"
        is_like = parts.shape.partition(" ")[0] == visit.query.get("shape", "servers")
        if is_polled and is_like:
            if not snapshot.rows:
                return Response(status_code=204)
            values["aside"] = "".join(out_of_band(name, parts.fragments[name]) for name in ("headline", "cards", "queues"))
            return self._renderer.fragment(visit, "_board.html", headers={"hx-replace-url": values["here"]}, **values)
        page = self._renderer.page(
            visit,
            "dashboard.html",
            active="dashboard",
            usage=await usage_text(self._renderer, visit) if visit.is_operator else None,
            statuses=views.STATUSES,
            sort_words=views.SORTS,
            models=sorted({server.model_name for server in routes}),
            owners=sorted({server.metadata.student_id for server in routes if server.metadata.student_id}) if visit.is_operator else [],
            base_url=self._renderer.base_url(visit.request),
            overview=snapshot.overview,
            reach=self._first_steps.reach(visit),
            **({} if snapshot.rows else await self._first_steps.welcome(visit)),
            **values,
        )
        if is_polled:
            page.headers.update(_WHOLE)
        return page

    def _followed(self, visit: Visit, parts_of: Callable[[Snapshot], Parts]) -> Followed:
        async def read() -> Parts:
            return parts_of(await self._recent_snapshot(visit))

        return FollowedParts(read, self._renderer.versions, visit.query.get("seen", ""))

    async def _fresh_snapshot(self, visit: Visit) -> Snapshot:
        """Return a new snapshot, which includes what other processes wrote."""
        await refresh_if_possible(self._gateway)
        return await self._take_snapshot(visit)

    async def _recent_snapshot(self, visit: Visit) -> Snapshot:
        """Return the snapshot of this tick, or a new one, which streams that ask at the same time share."""
        async with self._taking:
            last = self._snapshots.get(not visit.is_operator)
            return last if last is not None and anyio.current_time() - last.at < live.TICK_SECONDS else await self._take_snapshot(visit)

    async def _take_snapshot(self, visit: Visit) -> Snapshot:
        public = not visit.is_operator
        histories = await self._recent_checks.all()
        rows = self._rows.rows(histories, public=public)
        snapshot = self._snapshots[public] = Snapshot(
            anyio.current_time(), rows, views.overview(self._gateway), views.queues(self._gateway)
        )
        return snapshot

    def _dashboard_parts(self, visit: Visit, snapshot: Snapshot) -> Parts:
        query = views.Query.of(visit.query, public=not visit.is_operator)
        key = ("dashboard", query, visit.is_operator, str(visit.request.scope.get("root_path", "")))
        if key not in snapshot.parts:
            snapshot.parts[key] = self._make_dashboard_parts(visit, snapshot, query)
        return snapshot.parts[key]

    def _make_dashboard_parts(self, visit: Visit, snapshot: Snapshot, query: views.Query) -> Parts:
        matching = views.chosen(snapshot.rows, query)
        rows = views.folded(matching, query)
        shown = {f"row-{row.id}": self._rows.html(visit, row) for row in rows}
        if not rows:
            shown = {"row-none": self._renderer.render(visit, "_row_none.html")}
        is_folded = len(rows) < len(matching)
        fragments = {
            "headline": self._renderer.render(visit, "_headline.html", overview=snapshot.overview),
            "cards": self._renderer.render(visit, "_cards.html", overview=snapshot.overview),
            "queues": self._renderer.render(visit, "_queues.html", queues=snapshot.queues),
            "shown": self._renderer.render(
                visit,
                "_shown.html",
                shown=len(rows),
                total=len(matching if is_folded else snapshot.rows),
                everything=self._renderer.here(visit, "dashboard", attrs.evolve(query, all="1").pairs()) if is_folded else "",
            ),
        }
        return Parts(shape=self._shape(visit, snapshot), fragments=fragments, container="rows", rows=shown)

    def _shape(self, visit: Visit, snapshot: Snapshot) -> str:
        return ("servers" if snapshot.rows else "empty") + ("" if visit.is_operator else " for visitors")

    def _sort_link(self, visit: Visit, query: views.Query, sort: str) -> tuple[str, str]:
        """Return where the head of a column leads, and how the column is sorted now."""
        now = query.sort == sort
        order = "desc" if now and not query.order else ""
        state = "none" if not now else "descending" if query.order else "ascending"
        return self._renderer.here(visit, "dashboard", attrs.evolve(query, sort=sort, order=order).pairs()), state

    # Models

    async def _models(self, visit: Visit) -> Response:
        snapshot = await self._fresh_snapshot(visit)
        q = visit.query.get("q", "").strip()[:200]
        rows = self._model_rows(visit, snapshot)
        chosen = self._chosen(visit, snapshot, rows)
        parts = self._models_parts(visit, snapshot)
        named = {"model": chosen.row.name} if chosen is not None and "model" in visit.query else {}
        searched = {"q": q} if q else {}
        here = self._renderer.here(visit, "models", searched | named)
        values: dict[str, Any] = {
            "parts": parts,
            "chosen": chosen,
            "snippets": {} if chosen is None else self._snippets(visit, chosen),
            "live": self._renderer.live("models", searched | named, parts),
            "q": q,
            "named": named.get("model", ""),
            "here": here,
            "shown": len(rows),
            "total": len(self._gateway.table.models),
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            return self._renderer.fragment(visit, "_models.html", headers={"hx-replace-url": here}, **values)
        return self._renderer.page(visit, "models.html", active="models", overview=snapshot.overview, **values)

    def _snippets(self, visit: Visit, chosen: ChosenModel) -> Mapping[str, str]:
        base = f"{self._renderer.base_url(visit.request)}/v1"
        needs_key = self._gateway.settings.require_client_auth
        return snippets_of(base, chosen.row.name, needs_key=needs_key, streams=chosen.streaming, embeds=chosen.embeds)

    def _model_rows(self, visit: Visit, snapshot: Snapshot) -> list[ModelRow]:
        """Return the rows of the models whose names contain what was searched for, in their order."""
        wanted = visit.query.get("q", "").strip().casefold()[:200]
        models, speeds = self._gateway.table.models, self._gateway.usage_book.speeds
        rows = [
            row_of_model(models[key], servers, snapshot.queues.of(models[key].name), speeds)
            for key, servers in snapshot.by_model.items()
            if key in models and wanted in models[key].name.casefold()
        ]
        return in_order(rows)

    def _chosen(self, visit: Visit, snapshot: Snapshot, rows: Sequence[ModelRow]) -> ChosenModel | None:
        """Return the model that the address names, or else the first one that works, or the first one; `None` if there is none."""
        key = model_key(visit.query.get("model", ""))
        preferred = [*(row for row in rows if model_key(row.name) == key), *(row for row in rows if row.up), *rows]
        row = preferred[0] if preferred else None
        model = None if row is None else self._gateway.table.models.get(model_key(row.name))
        return None if row is None or model is None else chosen_model(model, row, snapshot.by_model[model_key(row.name)])

    def _models_parts(self, visit: Visit, snapshot: Snapshot) -> Parts:
        query = visit.query.get("q", ""), visit.query.get("model", "")
        key = ("models", *query, visit.is_operator, str(visit.request.scope.get("root_path", "")))
        if key not in snapshot.parts:
            snapshot.parts[key] = self._make_models_parts(visit, snapshot)
        return snapshot.parts[key]

    def _make_models_parts(self, visit: Visit, snapshot: Snapshot) -> Parts:
        rows = self._model_rows(visit, snapshot)
        chosen = self._chosen(visit, snapshot, rows)
        fragments = {} if chosen is None else {"servers-of-model": self._renderer.render(visit, "_model_servers.html", chosen=chosen)}
        q = visit.query.get("q", "").strip()[:200]

        def html(row: ModelRow) -> str:
            link = self._renderer.here(visit, "models", ({"q": q} if q else {}) | {"model": row.name})
            is_chosen = chosen is not None and chosen.row is row
            return self._renderer.render(visit, "_model_row.html", row=row, link=link, is_chosen=is_chosen)

        shape = "no models" if chosen is None else f"code of {chosen.row.name}"
        return Parts(shape=shape, fragments=fragments, container="models", rows={f"model-{row.id}": html(row) for row in rows})
