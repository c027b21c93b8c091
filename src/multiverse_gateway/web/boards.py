"""Dashboard and models: lists that follow what happens."""

from typing import Any
from urllib.parse import urlencode

import attrs
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.registration import refreshed
from multiverse_gateway.web import views
from multiverse_gateway.web.frame import Frame, Visit
from multiverse_gateway.web.gate import Gate
from multiverse_gateway.web.histories import Histories
from multiverse_gateway.web.live import Parts, follow, out_of_band
from multiverse_gateway.web.members import usage_values


class Boards:
    """What is up, by server and by model."""

    def __init__(self, frame: Frame, histories: Histories) -> None:
        self._frame = frame
        self._gateway = frame.gateway
        self._histories = histories
        self._rows: dict[tuple[str, bool, str], tuple[views.Row, str]] = {}

    def routes(self, gate: Gate) -> list[Route]:
        """Make their routes."""
        return [
            Route("/dashboard", gate.everybody(self._dashboard), name="ui:dashboard"),
            Route("/dashboard/live", gate.everybody(self._dashboard_live), name="ui:dashboard_live"),
            Route("/models", gate.everybody(self._models), name="ui:models"),
            Route("/models/live", gate.everybody(self._models_live), name="ui:models_live"),
        ]

    async def _dashboard(self, visit: Visit) -> Response:
        query = views.Query.of(visit.query, public=not visit.is_operator)
        parts = await self._dashboard_parts(visit)
        routes = [route.server for route in self._gateway.table.routes.values()]
        values: dict[str, Any] = {
            "query": query,
            "parts": parts,
            "aside": "",
            "live": f"{self._frame.url(visit.request, 'dashboard_live')}?{urlencode({**query.pairs(), 'seen': parts.digest})}",
            "here": self._frame.here(visit, "dashboard", query.pairs()),
            "sorts": {sort: self._sort_link(visit, query, sort) for sort in views.SORTS},
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            values["aside"] = "".join(out_of_band(name, parts.fragments[name]) for name in ("counts", "headline", "cards"))
            return self._frame.fragment(visit, "_board.html", headers={"hx-replace-url": values["here"]}, **values)
        return self._frame.page(
            visit,
            "dashboard.html",
            active="dashboard",
            **(await usage_values(self._frame, visit, "model") if visit.is_operator else {}),
            statuses=views.STATUSES,
            sort_words=views.SORTS,
            models=sorted({server.model_name for server in routes}),
            owners=sorted({server.metadata.student_id for server in routes if server.metadata.student_id}) if visit.is_operator else [],
            base_url=self._frame.base_url(visit.request),
            **values,
        )

    async def _dashboard_live(self, visit: Visit) -> Response:
        return self._frame.stream(follow(lambda: self._dashboard_parts(visit), self._frame.lasts(visit), visit.query.get("seen", "")))

    async def _all_rows(self, visit: Visit) -> list[views.Row]:
        await refreshed(self._gateway)
        histories = await self._histories.all()
        public = not visit.is_operator
        return [
            views.row_of(self._gateway, route, histories.get(server_id, ()), public=public)
            for server_id, route in self._gateway.table.routes.items()
        ]

    def _row_html(self, visit: Visit, row: views.Row) -> str:
        """Render a row, or take what was rendered when it was the same."""
        key = (row.id, visit.is_operator, str(visit.request.scope.get("root_path", "")))
        known = self._rows.get(key)
        if known is not None and known[0] == row:
            return known[1]
        html = self._frame.render(visit, "_row.html", row=row)
        if len(self._rows) > 4 * len(self._gateway.table.routes) + 100:
            self._rows.clear()
        self._rows[key] = (row, html)
        return html

    async def _dashboard_parts(self, visit: Visit) -> Parts:
        query = views.Query.of(visit.query, public=not visit.is_operator)
        everything = await self._all_rows(visit)
        rows = views.chosen(everything, query)
        shown = {f"row-{row.id}": self._row_html(visit, row) for row in rows}
        if not rows:
            shown = {"row-none": self._frame.render(visit, "_row_none.html")}
        fragments = {
            "counts": self._frame.render(visit, "_counts.html"),
            "headline": self._frame.render(visit, "_headline.html"),
            "cards": self._frame.render(visit, "_cards.html"),
            "shown": self._frame.render(visit, "_shown.html", shown=len(rows), total=len(everything)),
        }
        return Parts(shape="servers" if everything else "empty", fragments=fragments, container="rows", rows=shown)

    def _sort_link(self, visit: Visit, query: views.Query, sort: str) -> tuple[str, str]:
        """Return where the head of a column leads, and how the column is sorted now."""
        now = query.sort == sort
        order = "desc" if now and not query.order else ""
        state = "none" if not now else "descending" if query.order else "ascending"
        return self._frame.here(visit, "dashboard", attrs.evolve(query, sort=sort, order=order).pairs()), state

    async def _models(self, visit: Visit) -> Response:
        cards = await self._model_cards(visit)
        parts = await self._models_parts(visit)
        q = visit.query.get("q", "").strip()[:200]
        base = f"{self._frame.base_url(visit.request)}/v1"
        needs_key = self._gateway.settings.require_client_auth
        pairs = {"q": q} if q else {}
        values: dict[str, Any] = {
            "cards": cards,
            "parts": parts,
            "snippets": {card.name: views.snippets(base, card.name, needs_key=needs_key) for card in cards},
            "live": f"{self._frame.url(visit.request, 'models_live')}?{urlencode({**pairs, 'seen': parts.digest})}",
            "q": q,
            "here": self._frame.here(visit, "models", pairs),
            "total": len(self._gateway.table.models),
        }
        if visit.is_fragment and visit.request.headers.get("hx-target") == "live":
            return self._frame.fragment(visit, "_models.html", headers={"hx-replace-url": values["here"]}, **values)
        return self._frame.page(visit, "models.html", active="models", **values)

    async def _models_live(self, visit: Visit) -> Response:
        return self._frame.stream(follow(lambda: self._models_parts(visit), self._frame.lasts(visit), visit.query.get("seen", "")))

    async def _model_cards(self, visit: Visit) -> list[views.ModelCard]:
        wanted = visit.query.get("q", "").strip().casefold()[:200]
        rows = await self._all_rows(visit)
        by_model: dict[str, list[views.Row]] = {}
        for row in rows:
            by_model.setdefault(row.model, []).append(row)
        models = self._gateway.table.models
        names = sorted((name for name in by_model if name in models), key=lambda name: (name.casefold(), name))
        cards = [views.model_card(models[name], by_model[name], number) for number, name in enumerate(names)]
        return [card for card in cards if wanted in card.name.casefold()]

    async def _models_parts(self, visit: Visit) -> Parts:
        cards = await self._model_cards(visit)
        fragments = {"counts": self._frame.render(visit, "_counts.html")}
        for card in cards:
            fragments[f"share-{card.number}"] = self._frame.render(visit, "_share.html", card=card)
            fragments[f"servers-{card.number}"] = self._frame.render(visit, "_model_servers.html", card=card)
        return Parts(shape="|".join(card.name for card in cards), fragments=fragments)
