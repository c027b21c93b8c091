"""The pages of those who host: register a server, see everything about it, check, change and remove it."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.accounts import register_owned, renew_owner_token
from multiverse_gateway.api.request_reading import parse_change
from multiverse_gateway.api.response_types import iso, iso_or_none
from multiverse_gateway.core.errors import GatewayError, ModelNotOffered, NotFound, ServerNotFound
from multiverse_gateway.core.history import statistics
from multiverse_gateway.core.routing import Route as ServerRoute
from multiverse_gateway.core.timelines import uptimes
from multiverse_gateway.pages import views
from multiverse_gateway.pages.charts import chart_of, events_of
from multiverse_gateway.pages.connection_steps import UNTRIED, ShownTest, steps_until, try_steps, wait_until_loaded
from multiverse_gateway.pages.engine_words import engine_facts
from multiverse_gateway.pages.first_steps import FirstSteps
from multiverse_gateway.pages.live import Followed, FollowedParts, Parts
from multiverse_gateway.pages.live_topics import Topic
from multiverse_gateway.pages.recent_checks import RecentChecks
from multiverse_gateway.pages.registered import registered_values
from multiverse_gateway.pages.rendering import NEXT_PIECE, Renderer, Visit
from multiverse_gateway.pages.server_form import (
    FIELDS,
    change_body,
    changed_fields,
    check_field,
    field_of,
    message_of,
    recognize,
    registration_of,
    trial_of,
    values_of,
)
from multiverse_gateway.pages.sign_in import SignIn
from multiverse_gateway.pages.states import next_check_text
from multiverse_gateway.pages.usage_page import usage_text
from multiverse_gateway.pages.words import count, sentence
from multiverse_gateway.registration import check, refresh_if_possible, remove, route_of, server_id_of, stated, update
from multiverse_gateway.web.middleware import ADDRESS


class ServerPages:
    """Servers, one at a time."""

    def __init__(self, renderer: Renderer, recent_checks: RecentChecks, first_steps: FirstSteps) -> None:
        self._renderer = renderer
        self._gateway = renderer.gateway
        self._recent_checks = recent_checks
        self._first_steps = first_steps

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of these pages."""
        page = sign_in.operators
        return [
            Route("/register", page(self._register), methods=["GET", "POST"], name="ui:register"),
            Route("/register/address", page(self._recognize), methods=["POST"], name="ui:recognize"),
            Route("/register/field", page(self._validate), methods=["POST"], name="ui:validate"),
            Route("/register/test", page(self._test), methods=["POST"], name="ui:try_server"),
            Route("/server/{server_id}", page(self._server), name="ui:server"),
            Route("/server/{server_id}/check", page(self._check_now), methods=["POST"], name="ui:check_now"),
            Route("/server/{server_id}/delete", page(self._delete), methods=["POST"], name="ui:delete"),
            Route("/server/{server_id}/limit", page(self._take_stated), methods=["POST"], name="ui:take_stated"),
            Route("/server/{server_id}/token", page(self._renew_token), methods=["POST"], name="ui:renew_token"),
            Route("/server/{server_id}/edit", page(self._edit), methods=["GET", "POST"], name="ui:edit"),
        ]

    def topics(self) -> Mapping[str, Topic]:
        """Return what browsers can follow of these pages."""
        return {"server": self._followed}

    async def _register(self, visit: Visit) -> Response:
        if visit.request.method == "GET":
            given = {name: visit.query.get(name, "") for name in FIELDS if name != "api_key"} | {"streaming": "on"}
            offers = await self._first_steps.offers(visit)
            return self._renderer.page(
                visit, "register.html", active="register", values=given, problems={}, problem="", test=UNTRIED, offers=offers
            )
        try:
            await self._count_probe(visit)
            registration, has_cap = registration_of(visit.form)
            accepted = await register_owned(self._gateway, registration, has_cap=has_cap)
        except GatewayError as error:
            return self._form_problem(visit, "register.html", error)
        values = registered_values(self._renderer, visit, accepted)
        if visit.is_fragment:
            headers = {"hx-retarget": "#wizard", "hx-reswap": "outerHTML show:window:top"}
            response = self._renderer.fragment(visit, "_registered.html", headers=headers, **values)
            return self._renderer.toast(response, "success", f"{accepted.server.model_name} is registered.")
        return self._renderer.page(visit, "registered.html", active="register", **values)

    def _form_problem(self, visit: Visit, template: str, error: GatewayError, **values: Any) -> Response:
        """Show what is wrong beside the field; what was typed stays. Our own scripts count down until a limit is over."""
        if error.status == 429 and visit.is_fragment:
            raise error
        field, message = field_of(error), message_of(error)
        problems = {field: message} if field else {}
        tested = steps_until(error)
        if visit.is_fragment:
            close_names = error.close_names if isinstance(error, ModelNotOffered) else ()
            response = self._renderer.fragment(
                visit,
                "_problem.html",
                status=422,
                field=field,
                problem=message,
                close_names=close_names,
                test=None if tested is UNTRIED else tested,
            )
        else:
            shown = {name: visit.form.get(name, "") for name in FIELDS if name != "api_key"}
            values = {
                "active": "register",
                "values": shown,
                "problems": problems,
                "problem": message,
                "test": tested,
                "offers": (),
                **values,
            }
            response = self._renderer.page(visit, template, status=error.status, **values)
        response.raw_headers.extend(error.headers())
        return response

    async def _recognize(self, visit: Visit) -> Response:
        return self._renderer.fragment(visit, "_note.html", note=recognize(self._gateway, visit.form.get("endpoint_url", "")))

    async def _validate(self, visit: Visit) -> Response:
        name = visit.query.get("name", "")
        if name not in FIELDS:
            raise NotFound("This field does not exist")
        return self._renderer.fragment(visit, "_note.html", note=check_field(visit.form, name))

    async def _test(self, visit: Visit) -> Response:
        try:
            await self._count_probe(visit)
            form = dict(visit.form)
            route = route_of(self._gateway, server_id_of(form["server_id"])) if form.get("server_id") else None
            is_same = route is not None and form.get("endpoint_url", "").strip() == route.server.endpoint_url
            if route is not None and is_same and not form.get("api_key"):
                form["api_key"] = route.server.api_key or ""  # to the address that it belongs to, and to no other
            opened_address = route.server.opened_address if route is not None and is_same else None
            trial = trial_of(form)
        except GatewayError as error:
            return self._form_problem(visit, "register.html", error)
        named = form.get("model_name", "").strip()

        def try_once() -> AsyncIterator[ShownTest]:
            return try_steps(self._gateway, trial, named, opened_address=opened_address)

        async def pieces() -> AsyncIterator[str]:
            waits = form.get("wait") == "1"
            async for test in wait_until_loaded(try_once, self._renderer.lasts(visit)) if waits else try_once():
                if test.is_over:
                    yield self._renderer.render(visit, "_tested.html", test=test, named=named)
                else:
                    yield self._renderer.render(visit, "_steps.html", test=test) + NEXT_PIECE

        return self._renderer.pieces(visit, pieces())

    async def _count_probe(self, visit: Visit) -> None:
        await self._renderer.rules.count_probe(visit.request.scope.get(ADDRESS, "unknown"))

    async def _server(self, visit: Visit) -> Response:
        await refresh_if_possible(self._gateway)
        values = await self._server_values(visit)
        parts = self._server_parts(visit, values)
        server = values["server"]
        return self._renderer.page(
            visit,
            "server.html",
            active="dashboard",
            parts=parts,
            usage=await usage_text(self._renderer, visit, server.id),
            live=self._renderer.live("server", {"id": server.id}, parts),
            **values,
        )

    def _followed(self, visit: Visit) -> Followed:
        async def read() -> Parts:
            try:
                return self._server_parts(visit, await self._server_values(visit))
            except ServerNotFound:
                return Parts(shape="gone")

        return FollowedParts(read, self._renderer.versions, visit.query.get("seen", ""))

    def _server_parts(self, visit: Visit, values: Mapping[str, Any]) -> Parts:
        names = {
            "state": "_server_state.html",
            "figures": "_server_figures.html",
            "chart": "_chart.html",
            "events": "_events.html",
        }
        return Parts(shape="server", fragments={name: self._renderer.render(visit, template, **values) for name, template in names.items()})

    async def _server_values(self, visit: Visit) -> dict[str, Any]:
        route = self._route(visit)
        checks = await self._recent_checks.of(route)
        row = views.row_of(self._gateway, route, checks)
        timeline = self._gateway.health_book.timelines.of(route.server.id)
        measured = uptimes(timeline, route.health.last_checked_at, self._gateway.wall())
        return {
            "server": route.server,
            "health": route.health,
            "row": row,
            "mean_response_time": statistics(checks, wall=self._gateway.wall()).mean_response_time,
            "uptimes": measured,
            "day_since": iso_or_none(measured.day_since),
            "week_since": iso_or_none(measured.week_since),
            "chart": chart_of(timeline, checks, until=measured.until),
            "engine_facts": engine_facts(
                route.server, route.health.measured, cut_texts=self._gateway.health_book.cut_texts.get(route.server.id, 0)
            ),
            "events": events_of(route, checks, now=self._gateway.now()),
            "registered_at": iso(route.server.registered_at),
            "updated_at": iso(route.server.updated_at),
            "transition_at": iso_or_none(route.health.last_transition_at),
            "next_check": next_check_text(route.health, self._gateway.now()) if row.status != "healthy" else "",
        }

    def _route(self, visit: Visit) -> ServerRoute:
        server_id = visit.request.path_params.get("server_id") or visit.query.get("id", "")
        return route_of(self._gateway, server_id_of(server_id))

    async def _check_now(self, visit: Visit) -> Response:
        server_id = server_id_of(visit.request.path_params["server_id"])
        await self._count_probe(visit)
        result = await check(self._gateway, server_id)
        kind = "success" if result.passed else "error"
        took = f"The check passed in {round(1000 * result.duration)} ms." if result.passed else "The check failed: "
        message = took if result.passed else took + sentence(result.reason or "no answer")
        if visit.is_fragment:
            return self._renderer.toast(Response(status_code=204), kind, message)
        return self._renderer.done(visit, kind, message, "server", server_id=server_id)

    async def _delete(self, visit: Visit) -> Response:
        route = self._route(visit)
        await remove(self._gateway, route.server.id)
        return self._renderer.done(
            visit, "success", f"{route.server.model_name} was removed. You can register it again at any time.", "dashboard"
        )

    async def _take_stated(self, visit: Visit) -> Response:
        """Ask a server's engine how many requests it answers at once, and let the server get as many."""
        await refresh_if_possible(self._gateway)
        server = self._route(visit).server
        await self._count_probe(visit)
        engine = await stated(self._gateway, server)
        if engine.limit is None:
            return self._renderer.done(visit, "info", f"{engine.fact}. Nothing was changed.", "server", server_id=server.id)
        await update(
            self._gateway, server.id, parse_change({"max_concurrency": engine.limit}), before_probe=lambda: self._count_probe(visit)
        )
        message = f"Saved: {count(engine.limit, 'request')} at once. {engine.fact}."
        return self._renderer.done(visit, "success", message, "server", server_id=server.id)

    async def _renew_token(self, visit: Visit) -> Response:
        """Make a new owner token and show it once; the token before it stops working."""
        server = self._route(visit).server
        token = await renew_owner_token(self._gateway, server.id)
        template = "_owner_token.html" if visit.is_fragment else "owner_token.html"
        if visit.is_fragment:
            return self._renderer.fragment(visit, template, token=token)
        response = self._renderer.page(visit, template, active="dashboard", server=server, token=token)
        response.headers["cache-control"] = "no-store"
        return response

    async def _edit(self, visit: Visit) -> Response:
        await refresh_if_possible(self._gateway)
        server = self._route(visit).server
        more: dict[str, Any] = {"server": server, "active": "dashboard", "before": values_of(server)}
        if visit.request.method == "GET":
            return self._renderer.page(visit, "edit.html", values=values_of(server), problems={}, problem="", test=UNTRIED, **more)
        names = changed_fields(visit.form, server)
        if not names:
            return self._renderer.done(visit, "info", "Nothing was changed.", "server", server_id=server.id)
        try:
            change = parse_change(change_body(visit.form, names))
            await update(self._gateway, server.id, change, before_probe=lambda: self._count_probe(visit))
        except GatewayError as error:
            return self._form_problem(visit, "edit.html", error, **more)
        changed = ", ".join(FIELDS[name] for name in names)
        return self._renderer.done(visit, "success", f"Saved: {changed}.", "server", server_id=server.id)
