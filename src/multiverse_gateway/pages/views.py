"""What the pages show, as values: rows, heartbeat bars, charts, events in words. No HTML stands here.

`STATES` is the one place that says what a state is called and which tone (colour) it has; the style sheet knows the tones.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import attrs

from multiverse_gateway.api.status import counts
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.history import statistics
from multiverse_gateway.core.routing import Model, Route, listed_name
from multiverse_gateway.core.usage import NOBODY
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.records import ServerCounts, iso

BEATS = 30
HISTORY = 100
SLOW_SECONDS = 1.0
SORTS = {
    "registered": "Newest first",
    "model": "Model",
    "status": "Status, down first",
    "checked": "Last check",
    "response": "Response time",
    "uptime": "Uptime",
    "owner": "Owner",
}
STATUSES = {"healthy": "Healthy", "unhealthy": "Down", "unknown": "Not checked yet"}


class Tone(StrEnum):
    """How good news are; each is a colour, and never the only sign."""

    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    IDLE = "idle"


@attrs.frozen
class State:
    """What a state of health is called."""

    word: str
    tone: Tone
    meaning: str


STATES: Mapping[HealthState, State] = {
    HealthState.UNHEALTHY: State("Down", Tone.BAD, "It failed; it gets no requests and comes back by itself once a check passes."),
    HealthState.MISCONFIGURED: State("No access", Tone.BAD, "It answers but refuses the gateway; its owner can fix its key or tunnel."),
    HealthState.DEACTIVATED: State(
        "Taken out", Tone.BAD, "It failed several checks in a row; it is checked less often, and comes back by itself."
    ),
    HealthState.SUSPECT: State(
        "In doubt", Tone.WARN, "It broke off a request or answers late; a check decides, and until then others go first."
    ),
    HealthState.HALF_OPEN: State("Recovering", Tone.WARN, "It answers again and gets one request at a time until it has proven itself."),
    HealthState.PROBING: State("Checking", Tone.IDLE, "It was just registered and waits for its first check."),
    HealthState.HEALTHY: State("Healthy", Tone.GOOD, "It answers its checks and takes requests."),
    HealthState.ARCHIVED: State("Archived", Tone.IDLE, "It was silent for days and is not checked any more; Check now brings it back."),
}
"""In the order in which servers are sorted by status."""
_RANKS = {state: rank for rank, state in enumerate(STATES.values())}


# Heartbeats


@attrs.frozen(kw_only=True)
class Beat:
    """One check, as a stroke of the bar."""

    x: int
    tone: Tone
    at: str
    milliseconds: int
    words: str


@attrs.frozen(kw_only=True)
class Bar:
    """The last checks of a server, oldest first."""

    beats: tuple[Beat, ...]
    summary: str
    places: int = BEATS

    @property
    def width(self) -> int:
        """The width of the whole bar."""
        return self.places * 7 - 2


def tone_of(check: ProbeResult) -> Tone:
    """Return how good a check was."""
    if not check.passed:
        return Tone.BAD
    return Tone.WARN if check.warning or check.duration >= SLOW_SECONDS else Tone.GOOD


def words_of(check: ProbeResult) -> str:
    """Say what a check found."""
    return sentence(check.reason or check.warning or ("slow, but well" if check.duration >= SLOW_SECONDS else "well"))


def heartbeat(checks: Sequence[ProbeResult]) -> Bar:
    """Make the bar of checks that stand newest first."""
    last = list(reversed(checks[:BEATS]))
    offset = BEATS - len(last)
    beats = tuple(
        Beat(
            x=7 * (offset + place),
            tone=tone_of(check),
            at=iso(check.checked_at) or "",
            milliseconds=round(1000 * check.duration),
            words=words_of(check),
        )
        for place, check in enumerate(last)
    )
    failed = sum(not check.passed for check in last)
    if not last:
        return Bar(beats=(), summary="No checks yet")
    return Bar(beats=beats, summary=f"Last {count(len(last), 'check')}: {len(last) - failed} passed, {failed} failed")


# Servers


@attrs.frozen(kw_only=True)
class Row:
    """A server as the dashboard shows it; for visitors without URL, owner and reason."""

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
    in_flight: int
    max_concurrency: int | None
    bar: Bar
    registered_at: float

    def mentions(self, text: str) -> bool:
        """Return whether the text stands in what is shown."""
        wanted = text.casefold()
        shown = (self.model, self.url, self.owner, self.description, self.state.word, self.id)
        return any(wanted in word.casefold() for word in shown if word)


def row_of(gateway: Gateway, route: Route, checks: Sequence[ProbeResult], *, public: bool = False) -> Row:
    """Make the row of a server."""
    server, health = route.server, route.health
    found = statistics(checks, wall=gateway.wall())
    passed = next((check for check in checks if check.passed), None)
    bar = heartbeat(checks)
    if public:
        bar = attrs.evolve(bar, beats=tuple(attrs.evolve(beat, words=_plain(beat.tone)) for beat in bar.beats))
    return Row(
        id=server.id,
        model=server.model_name,
        state=STATES[health.state],
        status=health.status,
        why=None if public else reason_of(health, gateway.now()),
        url="" if public else server.endpoint_url,
        bare_url="" if public else bare_url(server.endpoint_url),
        owner=None if public else server.metadata.student_id,
        description=None if public else server.metadata.description,
        checked_at=iso(health.last_checked_at),
        milliseconds=None if passed is None else round(1000 * passed.duration),
        uptime=found.uptime_percentage,
        in_flight=gateway.load.in_flight(server.id),
        max_concurrency=None if public else server.max_concurrency,
        bar=bar,
        registered_at=server.registered_at,
    )


def _plain(tone: Tone) -> str:
    return {Tone.GOOD: "Well", Tone.WARN: "Well, but slow", Tone.BAD: "Failed", Tone.IDLE: ""}[tone]


def reason_of(health: Health, now: float) -> str | None:
    """Say why a server is not simply healthy, or what to know of it although it is."""
    if health.status != "healthy":
        return None if health.reason is None else sentence(health.reason)
    if health.rest.until > now:
        return "Busy: it asked for a pause."
    if health.state is HealthState.SUSPECT and health.reason is not None:
        return sentence(health.reason)
    if health.blame.lacking_until > now:
        return "It did not have the model a moment ago; other servers are chosen first."
    if health.blame.doubted_until > now:
        return "Requests of one client failed here; other servers are chosen first."
    return None if health.warning is None else sentence(health.warning)


def next_check_words(health: Health, now: float) -> str:
    """Say when a server is checked next, roughly."""
    if health.next_probe.at == float("inf"):
        return "comes only when somebody asks for it"
    wait = health.next_probe.at - now
    return "is due now" if wait <= 1 else f"comes in about {span(wait)}"


@attrs.frozen(kw_only=True)
class Query:
    """What the dashboard is asked for; empty words ask for nothing."""

    q: str = ""
    model: str = ""
    status: str = ""
    owner: str = ""
    sort: str = "registered"
    order: str = ""

    @classmethod
    def of(cls, values: Mapping[str, str], *, public: bool = False) -> "Query":
        """Read a query; what cannot be used counts as not said. Visitors cannot ask for owners: the answer would tell them."""
        sorts = [sort for sort in SORTS if not (public and sort == "owner")]
        return cls(
            q=values.get("q", "").strip()[:200],
            model=values.get("model", "")[:200],
            status=values.get("status", "") if values.get("status") in STATUSES else "",
            owner="" if public else values.get("owner", "")[:200],
            sort=values.get("sort", "") if values.get("sort") in sorts else "registered",
            order="desc" if values.get("order") == "desc" else "",
        )

    def pairs(self) -> dict[str, str]:
        """Return what is not as usual, as it stands in the URL."""
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
"""What rows are sorted by; `None` stands last in either direction."""


def chosen(rows: Iterable[Row], query: Query) -> list[Row]:
    """Return the rows that are asked for, in order."""
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
    known = [row for row in kept if value(row) is not None]
    unknown = [row for row in kept if value(row) is None]
    return [*sorted(known, key=value, reverse=query.order == "desc"), *unknown]


# The whole


@attrs.frozen(kw_only=True)
class Overview:
    """How everything is doing, in numbers and in a sentence."""

    servers: int
    healthy: int
    down: int
    models: int
    requests: int
    in_flight: int
    tone: Tone
    headline: str


def overview(gateway: Gateway) -> Overview:
    """Sum up the gateway."""
    totals = counts(gateway)
    down = totals.unhealthy_servers + totals.inactive_servers
    tone, headline = _headline(totals, down, _unserved(gateway))
    return Overview(
        servers=totals.total_servers,
        healthy=totals.healthy_servers,
        down=down,
        models=totals.models,
        requests=gateway.usage_book.totals["requests"],
        in_flight=gateway.load.total,
        tone=tone,
        headline=headline,
    )


@attrs.frozen(kw_only=True)
class Queue:
    """The requests that wait for a model in this process; `slots` is what its servers take at once, `None` without a limit."""

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
    """Return what waits in this process."""
    queue = gateway.room.queue
    if not queue.anybody_waits:
        return NO_QUEUES
    models = []
    for name in queue.lengths():
        crowd = queue.crowd(name)
        models.append(
            Queue(
                model=listed_name(gateway.table, name),
                waiting=crowd.waiting,
                clients=crowd.clients_waiting,
                running=crowd.running,
                slots=crowd.slots,
            )
        )
    models.sort(key=lambda found: (-found.waiting, found.model))
    without_key = Counter(
        exchange.ticket.flow for exchange in gateway.exchanges if exchange.ticket.is_waiting and exchange.caller == NOBODY
    )
    return Queues(models=tuple(models), shared=any(requests > 1 for requests in without_key.values()))


def _unserved(gateway: Gateway) -> list[str]:
    """Return the models that nobody serves; what was given up long ago, or waits for its first check, is not missed."""
    missed = []
    for model in gateway.table.models.values():
        states = {route.health.status for route in model.routes if route.health.state is not HealthState.ARCHIVED}
        if states == {"unhealthy"}:
            missed.append(model.name)
    return sorted(missed)


def _headline(totals: ServerCounts, down: int, unserved: Sequence[str]) -> tuple[Tone, str]:
    servers, waiting = totals.total_servers, totals.unknown_servers
    if not servers:
        return Tone.IDLE, "No server is registered yet."
    if waiting == servers:
        return Tone.IDLE, "The server waits for its first check." if servers == 1 else f"All {servers} servers wait for their first check."
    if totals.healthy_servers == servers:
        return Tone.GOOD, "The server is up." if servers == 1 else f"All {servers} servers are up; every model is served."
    words = [_share(down, servers, "down") if down else _share(totals.healthy_servers, servers, "up")]
    if unserved:
        words.append(f"nobody serves {listed(unserved)}")
    elif not waiting:
        words.append("every model is served")
    if waiting:
        words.append(f"{waiting} {'waits for its' if waiting == 1 else 'wait for their'} first check")
    return Tone.BAD if unserved else Tone.WARN if down else Tone.GOOD, f"{'; '.join(words)}."


def _share(part: int, servers: int, word: str) -> str:
    if part == servers:
        return f"The only server is {word}" if servers == 1 else f"All {servers} servers are {word}"
    return f"{part} of {servers} servers {'is' if part == 1 else 'are'} {word}"


# One server


@attrs.frozen(kw_only=True)
class Mark:
    """One check in the chart."""

    x: int
    y: int
    height: int
    tone: Tone
    at: str
    milliseconds: int
    words: str


@attrs.frozen(kw_only=True)
class Chart:
    """Response times of the last checks, oldest first; `ticks` are heights with their labels, from the top down."""

    marks: tuple[Mark, ...]
    ticks: tuple[tuple[int, str], ...]
    begins: str | None
    ends: str | None
    width: int = HISTORY * 7
    height: int = 160
    summary: str = ""


def chart_of(checks: Sequence[ProbeResult]) -> Chart:
    """Make the chart of checks that stand newest first."""
    shown = list(reversed(checks[:HISTORY]))
    top = _ceiling(max((check.duration for check in shown if check.passed), default=0.1))
    height = 160
    offset = HISTORY - len(shown)
    marks = []
    for place, check in enumerate(shown):
        part = min(1.0, check.duration / top) if check.passed else 1.0
        tall = max(4, round(height * part))
        marks.append(
            Mark(
                x=7 * (offset + place),
                y=height - tall,
                height=tall,
                tone=tone_of(check),
                at=iso(check.checked_at) or "",
                milliseconds=round(1000 * check.duration),
                words=words_of(check),
            )
        )
    failed = sum(not check.passed for check in shown)
    return Chart(
        marks=tuple(marks),
        ticks=tuple((round(height * (1 - part)), _milliseconds(top * part)) for part in (1.0, 0.5, 0.0)),
        begins=iso(shown[0].checked_at) if shown else None,
        ends=iso(shown[-1].checked_at) if shown else None,
        summary=f"Response times of the last {count(len(shown), 'check')}, {failed} of them failed.",
    )


def _ceiling(seconds: float) -> float:
    """Return the next round number, so that the scale does not jump with every check."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60):
        if seconds <= step:
            return step
    return 120.0


def _milliseconds(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 or seconds == 0 else f"{1000 * seconds:g} ms"


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened to a server, in words."""

    at: str
    tone: Tone
    title: str
    words: str


def events_of(route: Route, checks: Sequence[ProbeResult], *, now: float = 0.0, limit: int = 20) -> list[Event]:
    """Say what the checks tell, newest first: when it went down and why, when it came back and after how long.

    `checks` stand newest first; `now` is the monotonic clock that the next check is due by.
    """
    server, health = route.server, route.health
    events = [_event(server.registered_at, Tone.IDLE, "Registered", f"As {server.model_name}.")]
    for outage in _outages(checks[::-1]):
        events += _story(outage, route, now)
    moved, newest = health.last_transition_at, checks[0].checked_at if checks else 0.0
    if moved is not None and moved > newest + 0.5:
        state = STATES[health.state]
        events.append(_event(moved, state.tone, f"Marked {state.word.lower()}", sentence(health.reason or state.meaning)))
    return sorted(events, key=lambda event: event.at, reverse=True)[:limit]


@attrs.frozen
class _Outage:
    """Failed checks in a row, oldest first, and the one that ended them, if any did."""

    failed: tuple[ProbeResult, ...]
    end: ProbeResult | None


def _outages(checks: Sequence[ProbeResult]) -> Iterator[_Outage]:
    """Yield the outages in checks that stand oldest first."""
    failed: list[ProbeResult] = []
    for check in checks:
        if not check.passed:
            failed.append(check)
        elif failed:
            yield _Outage(tuple(failed), check)
            failed = []
    if failed:
        yield _Outage(tuple(failed), None)


def _story(outage: _Outage, route: Route, now: float) -> Iterator[Event]:
    """Tell of one outage: its beginning, each new reason, its end."""
    first, reason = outage.failed[0], None
    for check in outage.failed:
        if check.reason != reason:
            words = words_of(check)
            if outage.end is None and check is _last_new(outage.failed):
                words += f" {count(len(outage.failed), 'check')} failed so far; the next one {next_check_words(route.health, now)}."
            yield _event(check.checked_at, Tone.BAD, "Marked down" if check is first else "Still down", words)
        reason = check.reason
    if outage.end is not None:
        lasted = span(outage.end.checked_at - first.checked_at)
        words = f"It answers again after {lasted}; {count(len(outage.failed), 'check')} had failed."
        yield _event(outage.end.checked_at, Tone.GOOD, "Came back", words)


def _last_new(failed: Sequence[ProbeResult]) -> ProbeResult:
    """Return the check that brought the reason that still holds."""
    place = len(failed) - 1
    while place and failed[place - 1].reason == failed[place].reason:
        place -= 1
    return failed[place]


def _event(at: float, tone: Tone, title: str, words: str) -> Event:
    return Event(at=iso(at) or "", tone=tone, title=title, words=words)


# Models


@attrs.frozen(kw_only=True)
class ModelCard:
    """A model and its servers."""

    name: str
    number: int
    healthy: int
    total: int
    streaming: bool
    context_length: int | None
    max_tokens: int | None
    rows: tuple[Row, ...]
    tone: Tone
    queue: Queue | None

    @property
    def percent(self) -> int:
        """The part of its servers that is healthy."""
        return round(100 * self.healthy / self.total) if self.total else 0


def model_card(model: Model, rows: Sequence[Row], number: int, queue: Queue | None) -> ModelCard:
    """Make the card of a model; `queue` holds what waits for it."""
    servers = [route.server for route in model.routes]
    healthy = sum(row.status == "healthy" for row in rows)
    contexts = [server.capabilities.context_length for server in servers if server.capabilities.context_length]
    longest = [server.capabilities.max_tokens for server in servers if server.capabilities.max_tokens]
    return ModelCard(
        name=model.name,
        number=number,
        healthy=healthy,
        total=len(rows),
        streaming=any(server.capabilities.streaming for server in servers),
        context_length=max(contexts, default=None),
        max_tokens=max(longest, default=None),
        rows=tuple(rows),
        tone=Tone.GOOD if healthy == len(rows) else Tone.WARN if healthy else Tone.BAD,
        queue=queue,
    )


def snippets(base_url: str, model: str, *, needs_key: bool) -> dict[str, str]:
    """Return code that uses a model, by language."""
    key = "your-client-key" if needs_key else "not-needed"
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    return {
        "Python": (
            "from openai import OpenAI\n\n"
            f"client = OpenAI(base_url={json.dumps(base_url)}, api_key={json.dumps(key)})\n"
            "answer = client.chat.completions.create(\n"
            f"    model={json.dumps(model)},\n"
            '    messages=[{"role": "user", "content": "Hello!"}],\n'
            ")\n"
            "print(answer.choices[0].message.content)\n"
        ),
        "Node": (
            'import OpenAI from "openai";\n\n'
            f"const client = new OpenAI({{ baseURL: {json.dumps(base_url)}, apiKey: {json.dumps(key)} }});\n"
            "const answer = await client.chat.completions.create({\n"
            f"  model: {json.dumps(model)},\n"
            '  messages: [{ role: "user", content: "Hello!" }],\n'
            "});\n"
            "console.log(answer.choices[0].message.content);\n"
        ),
        "curl": (
            f"curl {shlex.quote(base_url + '/chat/completions')} \\\n"
            + (f'  -H "Authorization: Bearer {key}" \\\n' if needs_key else "")
            + '  -H "Content-Type: application/json" \\\n'
            f"  -d {shlex.quote(json.dumps(body))}\n"
        ),
    }


# Words


def count(number: int, thing: str) -> str:
    """Write a number of things.

    >>> count(1, "server"), count(1200, "server")
    ('1 server', '1,200 servers')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def span(seconds: float) -> str:
    """Write a duration for people.

    >>> span(8), span(90), span(5400), span(200_000)
    ('8 s', '1 min', '1 h 30 min', '2 days')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 >= 60 else "")
    return f"{whole // 86_400} days"


def listed(names: Sequence[str], most: int = 2) -> str:
    """Write names as a sentence has them.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c", "d"])
    ('a', 'a and b', 'a, b and 2 more')
    """
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join(shown)


def size(number: int) -> str:
    """Write a number of bytes for people.

    >>> size(900), size(1_500_000)
    ('900 bytes', '1.4 MiB')
    """
    if number < 1024:
        return f"{number} bytes"
    return f"{number / 1024:.0f} KiB" if number < 1 << 20 else f"{number / (1 << 20):.1f} MiB"


def sentence(words: str) -> str:
    """Begin with a capital and end with a mark.

    >>> sentence("connection refused")
    'Connection refused.'
    """
    text = words.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def bare_url(url: str) -> str:
    """Leave the scheme out, which tables have no room for.

    >>> bare_url("https://amber-otter.ngrok-free.app")
    'amber-otter.ngrok-free.app'
    """
    return re.sub(r"^https?://", "", url)
