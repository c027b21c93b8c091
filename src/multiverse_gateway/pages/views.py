"""What the pages show, as values: rows, totals, queues, cards of models. This module writes no HTML."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from multiverse_gateway.api.response_types import iso_or_none
from multiverse_gateway.core.health import HealthState, needs_attention
from multiverse_gateway.core.routing import Route, listed_name
from multiverse_gateway.core.timelines import uptimes
from multiverse_gateway.core.totals import ServerTotals, totals_of
from multiverse_gateway.core.usage import NOBODY
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages.charts import Bar, bar_of
from multiverse_gateway.pages.states import ATTENTION, ORDER, State, Tone, reason_of, state_of
from multiverse_gateway.pages.words import bare_url, listed, shortened
from multiverse_gateway.protocols import ProbeResult

SORTS = {
    "registered": "Newest first",
    "model": "Model",
    "status": "Status, down first",
    "checked": "Last check",
    "response": "Response time",
    "uptime": "Uptime",
    "owner": "Owner",
}
STATUSES = {"healthy": "Healthy", "attention": ATTENTION.word, "unhealthy": "Down", "unknown": "Not checked yet"}
_RANKS = {state: rank for rank, state in enumerate(ORDER)}


# Servers


@attrs.frozen(kw_only=True)
class Row:
    """A server as the dashboard shows it; rows for visitors leave out the URL, the owner, the limit and the reason.

    `status` is one of `STATUSES`.
    """

    id: str
    model: str
    state: State
    status: str
    why: str | None
    url: str
    bare_url: str
    owner: str | None
    description: str | None
    checked_at: str | None
    milliseconds: int | None
    uptime: float | None
    uptime_since: str | None
    in_flight: int
    max_concurrency: int | None
    bar: Bar
    registered_at: float

    def mentions(self, text: str) -> bool:
        """Return whether a text occurs in what the row shows, in any case of letters."""
        wanted = text.casefold()
        shown = (self.model, self.url, self.owner, self.description, self.state.word, self.id)
        return any(wanted in word.casefold() for word in shown if word)


def row_of(gateway: Gateway, route: Route, checks: Sequence[ProbeResult], *, public: bool = False, bar: Bar | None = None) -> Row:
    """Return the row of a server; `checks` are sorted newest first. `bar` is that of these checks if it is known already."""
    server, health = route.server, route.health
    timeline = gateway.health_book.timelines.of(server.id)
    measured = uptimes(timeline, health.last_checked_at, gateway.wall())
    state = state_of(health, gateway.now())
    passed = next((check for check in checks if check.passed), None)
    return Row(
        id=server.id,
        model=server.model_name,
        state=state,
        status="attention" if state is ATTENTION else health.status,
        why=None if public else reason_of(health, gateway.now()),
        url="" if public else server.endpoint_url,
        bare_url="" if public else bare_url(server.endpoint_url),
        owner=None if public else server.metadata.student_id,
        description=None if public else server.metadata.description,
        checked_at=iso_or_none(health.last_checked_at),
        milliseconds=None if passed is None else round(1000 * passed.duration),
        uptime=measured.day.share,
        uptime_since=iso_or_none(measured.day_since),
        in_flight=gateway.load.in_flight(server.id),
        max_concurrency=None if public else server.max_concurrency,
        bar=bar_of(timeline, checks, until=measured.until) if bar is None else bar,
        registered_at=server.registered_at,
    )


@attrs.frozen(kw_only=True)
class Query:
    """Which rows the dashboard shows, and in which order; an empty field does not filter."""

    q: str = ""
    model: str = ""
    status: str = ""
    owner: str = ""
    sort: str = "registered"
    order: str = ""
    all: str = ""

    @classmethod
    def of(cls, values: Mapping[str, str], *, public: bool = False) -> "Query":
        """Read a query and ignore invalid values. Visitors cannot filter by owner: the rows that remain would disclose it."""
        sorts = [sort for sort in SORTS if not (public and sort == "owner")]
        return cls(
            q=values.get("q", "").strip()[:200],
            model=values.get("model", "")[:200],
            status=values.get("status", "") if values.get("status") in STATUSES else "",
            owner="" if public else values.get("owner", "")[:200],
            sort=values.get("sort", "") if values.get("sort") in sorts else "registered",
            order="desc" if values.get("order") == "desc" else "",
            all="1" if values.get("all") == "1" else "",
        )

    def pairs(self) -> dict[str, str]:
        """Return the fields that differ from the defaults, as the URL holds them."""
        usual = Query()
        return {name: value for name, value in attrs.asdict(self).items() if value != getattr(usual, name)}


_VALUES: Mapping[str, Callable[[Row], Any]] = {
    "registered": lambda row: -row.registered_at,
    "model": lambda row: row.model.casefold(),
    "status": lambda row: _RANKS[row.state],
    "checked": lambda row: row.checked_at,
    "response": lambda row: row.milliseconds,
    "uptime": lambda row: row.uptime,
    "owner": lambda row: row.owner.casefold() if row.owner else None,
}
"""The value that each order sorts by; rows with `None` come last in both directions."""


def chosen(rows: Iterable[Row], query: Query) -> list[Row]:
    """Return the rows that a query selects, sorted."""
    kept = [
        row
        for row in rows
        if query.model in ("", row.model)
        and query.status in ("", row.status)
        and query.owner in ("", row.owner)
        and (not query.q or row.mentions(query.q))
    ]

    kept.sort(key=lambda row: (row.model.casefold(), row.registered_at, row.id))
    value = _VALUES[query.sort]
    with_value = [row for row in kept if value(row) is not None]
    unknown = [row for row in kept if value(row) is None]
    return [*sorted(with_value, key=value, reverse=query.order == "desc"), *unknown]


FOLD = 50
"""Rows that a long list shows beside those of servers that are down."""
MOST_DOWN = 150


def folded(rows: Sequence[Row], query: Query) -> list[Row]:
    """Return the rows of a list that are shown at first: of a long one the first 50, and those that are down, 150 at most."""
    if query.all or len(rows) <= FOLD + FOLD // 5:
        return list(rows)
    down = [row.id for row in rows if row.status == "unhealthy"][:MOST_DOWN]
    first = [row.id for row in rows if row.status != "unhealthy"][:FOLD]
    shown = {*down, *first}
    return [row for row in rows if row.id in shown]


# ServerTotals and queues


@attrs.frozen(kw_only=True)
class Overview:
    """The state of the gateway and its servers, in numbers and in a sentence; `headline` cuts long names of models short."""

    servers: int
    healthy: int
    attention: int
    down: int
    models: int
    requests: int
    in_flight: int
    tone: Tone
    headline: str
    full_headline: str

    @property
    def title(self) -> str:
        """What the title of each page begins with while something is wrong."""
        return f"{self.down:,} down" if self.down else ""


def overview(gateway: Gateway) -> Overview:
    """Return the totals of a gateway."""
    totals = totals_of(gateway.table, gateway.now())
    down = totals.unhealthy + totals.inactive
    unserved, has_doubtful_models = _unserved(gateway), _has_doubtful_models(gateway)
    tone, headline = _headline(totals, down, [shortened(name) for name in unserved], has_doubtful_models=has_doubtful_models)
    return Overview(
        servers=totals.servers,
        healthy=totals.healthy - totals.attention,
        attention=totals.attention,
        down=down,
        models=totals.models,
        requests=gateway.usage_book.totals["requests"],
        in_flight=gateway.load.total,
        tone=tone,
        headline=headline,
        full_headline=_headline(totals, down, unserved, has_doubtful_models=has_doubtful_models)[1],
    )


@attrs.frozen(kw_only=True)
class Queue:
    """The requests that wait for a model in this process; `slots` is how many its servers take at once, `None` without a limit."""

    model: str
    waiting: int
    clients: int
    running: int
    slots: int | None


@attrs.frozen(kw_only=True)
class Queues:
    """The models that requests wait for, the longest queue first; `shared` if requests without a key share a place in one of them."""

    models: tuple[Queue, ...] = ()
    shared: bool = False

    @property
    def waiting(self) -> int:
        """Return how many requests wait for any model."""
        return sum(queue.waiting for queue in self.models)

    def of(self, model: str) -> Queue | None:
        """Return the queue of a model by its listed name, or `None` if no request waits for it."""
        return next((queue for queue in self.models if queue.model == model), None)


NO_QUEUES = Queues()


def queues(gateway: Gateway) -> Queues:
    """Return the queues of this process that are not empty."""
    queue = gateway.room.queue
    if not queue.anybody_waits:
        return NO_QUEUES
    models = []
    for name in queue.lengths():
        counts = queue.counts(name)
        models.append(
            Queue(
                model=listed_name(gateway.table, name),
                waiting=counts.waiting,
                clients=counts.clients_waiting,
                running=counts.running,
                slots=counts.slots,
            )
        )
    models.sort(key=lambda shown: (-shown.waiting, shown.model))
    without_key = Counter(
        exchange.search.flow for exchange in gateway.exchanges if exchange.search.is_waiting and exchange.request.caller.name == NOBODY
    )
    return Queues(models=tuple(models), shared=any(requests > 1 for requests in without_key.values()))


def _unserved(gateway: Gateway) -> list[str]:
    """Return the models without a healthy server; archived servers and models that wait for a first check do not count."""
    missed = []
    for model in gateway.table.models.values():
        states = {route.health.status for route in model.routes if route.health.state is not HealthState.ARCHIVED}
        if states == {"unhealthy"}:
            missed.append(model.name)
    return sorted(missed)


def _has_doubtful_models(gateway: Gateway) -> bool:
    """Return whether all healthy servers of some model need attention."""
    now = gateway.now()
    for model in gateway.table.models.values():
        healthy = [route.health for route in model.routes if route.health.status == "healthy"]
        if healthy and all(needs_attention(health, now) for health in healthy):
            return True
    return False


def _headline(totals: ServerTotals, down: int, unserved: Sequence[str], *, has_doubtful_models: bool) -> tuple[Tone, str]:
    servers, waiting, attention = totals.servers, totals.unknown, totals.attention
    if not servers:
        return Tone.IDLE, "No server is registered yet."
    if waiting == servers:
        return Tone.IDLE, f"{_all(servers)} {'is waiting for its' if servers == 1 else 'are waiting for their'} first check."
    up = totals.healthy - attention
    if up == servers:
        return Tone.GOOD, "The server is up." if servers == 1 else f"{_all(servers)} are up; all models available."
    if down:
        facts = [_share(down, servers, "is down", "are down")]
    elif up:
        facts = [_share(up, servers, "is up", "are up")]
    else:
        facts = []
    if attention:
        needs = "needs attention", "need attention"
        facts.append(f"{attention} {needs[attention > 1]}" if facts else _share(attention, servers, *needs))
    if unserved:
        facts.append(f"no server for {listed(unserved)}")
    elif not waiting and not has_doubtful_models:
        facts.append("all models available")
    if waiting:
        facts.append(f"{waiting} {'is waiting for its' if waiting == 1 else 'are waiting for their'} first check")
    return Tone.BAD if unserved else Tone.WARN if down or attention else Tone.GOOD, f"{'; '.join(facts)}."


def _all(servers: int) -> str:
    return {1: "The server", 2: "Both servers"}.get(servers, f"All {servers} servers")


def _share(part: int, servers: int, one: str, many: str) -> str:
    if part == servers:
        return f"The only server {one}" if servers == 1 else f"{_all(servers)} {many}"
    return f"{part} of {servers} servers {one if part == 1 else many}"


@attrs.frozen(kw_only=True)
class ModelState:
    """How many servers of a model are up."""

    name: str
    healthy: int
    total: int

    @property
    def tone(self) -> Tone:
        """The tone of the news: good if all are up, bad if none is."""
        return Tone.GOOD if self.healthy == self.total else Tone.WARN if self.healthy else Tone.BAD


def model_states(gateway: Gateway) -> list[ModelState]:
    """Return the states of all models, those without a server that is up first."""
    states = [
        ModelState(name=model.name, healthy=sum(route.health.status == "healthy" for route in model.routes), total=len(model.routes))
        for model in gateway.table.models.values()
    ]
    return sorted(states, key=lambda state: ((Tone.BAD, Tone.WARN, Tone.GOOD).index(state.tone), state.name.casefold(), state.name))
