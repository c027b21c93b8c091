"""The stream of a browser: the topics that its tabs follow, each with its own rule of who may see it."""

import json
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl

import anyio
import attrs
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from multiverse_gateway.pages import live, views
from multiverse_gateway.pages.live import Followed, FollowedState, RefusedTopic, follow
from multiverse_gateway.pages.rendering import OPEN_TO_VISITORS, Renderer, Visit
from multiverse_gateway.pages.sign_in import SignIn

Topic = Callable[[Visit], Followed]
"""Begins to follow a page for a visit, whose `query` is that of the topic."""


class LiveTopics:
    """What browsers can follow, by name: every page that changes by itself adds its topic."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._topics: dict[str, Topic] = {}
        self._state: tuple[float, str] | None = None

    def add(self, topics: Mapping[str, Topic]) -> None:
        """Add the topics of a page."""
        self._topics.update(topics)

    def routes(self, sign_in: SignIn) -> list[Route]:
        """Return the routes of the stream, and of the state for browsers whose tabs are all hidden."""
        page = sign_in.visitors_if_public
        return [
            Route("/live", page(self._live), name="ui:live"),
            Route("/live/state", page(self._state_now), name="ui:live_state"),
        ]

    async def _live(self, visit: Visit) -> Response:
        wanted = visit.request.query_params.getlist("of")[: live.MAX_TOPICS]
        topics = [self._topic(visit, text) for text in wanted]
        return self._renderer.stream(follow(FollowedState(self.state), topics, self._renderer.lasts(visit)))

    def _topic(self, visit: Visit, text: str) -> Followed:
        name, _, query = text.partition("?")
        topic = self._topics.get(name)
        if topic is None or not (visit.is_operator or name in OPEN_TO_VISITORS):
            return RefusedTopic()
        return topic(attrs.evolve(visit, topic=dict(parse_qsl(query, keep_blank_values=True, max_num_fields=20))))

    async def _state_now(self, visit: Visit) -> Response:
        return JSONResponse(json.loads(self.state()), headers={"cache-control": "no-store"})

    def state(self) -> str:
        """Return the state of all servers as JSON, computed once per tick for all streams."""
        now = anyio.current_time()
        if self._state is None or now - self._state[0] >= live.TICK_SECONDS:
            overview = views.overview(self._renderer.gateway)
            counts = self._renderer.render_shared("_counts.html", overview=overview)
            self._state = (now, json.dumps({"tone": overview.tone, "title": overview.title, "counts": counts.strip()}))
        return self._state[1]
