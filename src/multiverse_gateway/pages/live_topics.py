"""The stream of a browser: the topics that its tabs follow, each with its own rule of who may see it."""

import json
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl

import anyio
import attrs
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from multiverse_gateway.core.servers import WallLink
from multiverse_gateway.entry.identity import Headers
from multiverse_gateway.pages import live, views
from multiverse_gateway.pages.live import Followed, FollowedState, RefusedTopic, follow
from multiverse_gateway.pages.rendering import OPEN_TO_VISITORS, Renderer, Visit
from multiverse_gateway.pages.sign_in import SignIn

Topic = Callable[[Visit], Followed]
"""Begins to follow a page for a visit, whose `query` is that of the topic."""


class LiveTopics:
    """What browsers can follow, by name: every page that changes by itself adds its topic."""

    def __init__(self, renderer: Renderer, wall_link_of: Callable[[Headers], WallLink | None]) -> None:
        self._renderer = renderer
        self._wall_link_of = wall_link_of
        self._topics: dict[str, Topic] = {}
        self._state: tuple[float, str] | None = None

    def add(self, topics: Mapping[str, Topic]) -> None:
        """Add the topics of a page."""
        self._topics.update(topics)

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of the stream, and of the state for browsers whose tabs are all hidden."""
        self._sign_in = sign_in
        return [
            Route("/live", sign_in.visitors(self._live), name="ui:live"),
            Route("/live/state", sign_in.visitors(self._state_now), name="ui:live_state"),
        ]

    def _may_see(self, visit: Visit) -> bool:
        """Return whether a visit may see the state of the servers: an operator, a screen with a link, and visitors if it is public."""
        is_public = self._renderer.gateway.settings.public_dashboard
        return visit.is_operator or is_public or self._wall_link_of(visit.request.scope["headers"]) is not None

    async def _live(self, visit: Visit) -> Response:
        if not self._may_see(visit):
            return self._sign_in.ask_to_sign_in(visit)
        wanted = visit.request.query_params.getlist("of")[: live.MAX_TOPICS]
        topics = [self._topic(visit, text) for text in wanted]
        lasts = self._renderer.lasts(visit)
        is_screen = not visit.is_operator
        return self._renderer.stream(
            follow(FollowedState(self.state), topics, lambda: lasts() and not (is_screen and not self._may_see(visit)))
        )

    def _topic(self, visit: Visit, text: str) -> Followed:
        name, _, query = text.partition("?")
        topic = self._topics.get(name)
        if topic is None or not (visit.is_operator or self._is_open(visit, name)):
            return RefusedTopic()
        return topic(attrs.evolve(visit, topic=dict(parse_qsl(query, keep_blank_values=True, max_num_fields=20))))

    def _is_open(self, visit: Visit, name: str) -> bool:
        """Return whether a visitor may follow a topic."""
        if name == "wall":
            return self._wall_link_of(visit.request.scope["headers"]) is not None
        return name in OPEN_TO_VISITORS and self._renderer.gateway.settings.public_dashboard

    async def _state_now(self, visit: Visit) -> Response:
        if not self._may_see(visit):
            return self._sign_in.ask_to_sign_in(visit)
        return JSONResponse(json.loads(self.state()), headers={"cache-control": "no-store"})

    def state(self) -> str:
        """Return the state of all servers as JSON, computed once per tick for all streams."""
        now = anyio.current_time()
        if self._state is None or now - self._state[0] >= live.TICK_SECONDS:
            overview = views.overview(self._renderer.gateway)
            counts = self._renderer.render_shared("_counts.html", overview=overview)
            self._state = (now, json.dumps({"tone": overview.tone, "title": overview.title, "counts": counts.strip()}))
        return self._state[1]
