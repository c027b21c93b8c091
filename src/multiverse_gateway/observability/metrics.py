"""What is counted for Prometheus: plain numbers while requests run, which are formatted only when they are read.

A label takes few values: a model is one that is registered (else `other`), a server one of the table, the rest are words of ours.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import attrs
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from multiverse_gateway._version import __version__
from multiverse_gateway.core.failover import FailedAttempt, FailureClass
from multiverse_gateway.core.fairness import Band, Flow
from multiverse_gateway.core.servers import ServerId
from multiverse_gateway.core.usage import Tally, bounded
from multiverse_gateway.core.waits import RecentWaits

OTHER = "other"
FIRST_BYTE_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
REQUEST_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
WAIT_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0)
PROBE_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@attrs.define(eq=False)
class Histogram:
    """Seconds, counted by the bounds they are within.

    >>> found = Histogram((1.0, 2.0))
    >>> for seconds in (0.5, 1.0, 9.0):
    ...     found.note(seconds)
    >>> found.buckets(), found.total
    ([('1.0', 2), ('2.0', 2), ('+Inf', 3)], 10.5)
    """

    bounds: Sequence[float]
    total: float = 0.0
    _counts: list[int] = attrs.field(init=False)

    @_counts.default
    def _zeros(self) -> list[int]:
        return [0] * (len(self.bounds) + 1)

    def note(self, seconds: float) -> None:
        """Count one value into its bucket."""
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """Return how many are within each bound."""
        counts, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self._counts, strict=True):
            so_far += count
            counts.append((bound, so_far))
        return counts


ANSWERED = (
    "ok",
    *(
        kind.name.lower()
        for kind in FailureClass
        if kind not in (FailureClass.CONNECT, FailureClass.BROKEN, FailureClass.TIMEOUT, FailureClass.LOCAL)
    ),
)
"""Outcomes of attempts to which the server gave an answer."""


@attrs.define(eq=False)
class ModelMeter:
    """What happened to the requests for one model."""

    statuses: Counter[int] = attrs.field(factory=Counter)
    canceled: int = 0
    seconds: Histogram = attrs.field(factory=lambda: Histogram(REQUEST_BOUNDS))
    first_byte: Histogram = attrs.field(factory=lambda: Histogram(FIRST_BYTE_BOUNDS))
    waits: dict[Band, Histogram] = attrs.field(factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    events: int = 0
    sent_bytes: int = 0


@attrs.define(eq=False)
class Meter:
    """Everything that one process counts."""

    models: dict[str, ModelMeter] = attrs.field(factory=dict)
    attempts: Counter[tuple[ServerId, str]] = attrs.field(factory=Counter)
    refusals: Counter[str] = attrs.field(factory=Counter)
    refused_retries: int = 0
    probes: Counter[str] = attrs.field(factory=Counter)
    probe_seconds: Histogram = attrs.field(factory=lambda: Histogram(PROBE_BOUNDS))
    recent_waits: RecentWaits = attrs.field(factory=RecentWaits)

    def requests(self, tally: Tally) -> None:
        """Count requests that are over."""
        group = tally.group
        count = len(tally.seconds)
        meter = self.models.setdefault(group.model if group.is_known else OTHER, ModelMeter())
        meter.statuses[group.status] += count
        meter.canceled += count * group.canceled
        for seconds in tally.seconds:
            meter.seconds.note(seconds)
        for seconds in tally.first_byte_seconds:
            meter.first_byte.note(seconds)
        meter.prompt_tokens = bounded(meter.prompt_tokens + tally.prompt_tokens)
        meter.completion_tokens = bounded(meter.completion_tokens + tally.completion_tokens)
        meter.events += tally.events
        meter.sent_bytes += tally.sent_bytes
        if group.worked:
            self.attempts[group.server_id, "ok" if group.succeeded else "left"] += count

    def wait(self, model: str, flow: Flow, seconds: float, now: float) -> None:
        """Count a request that is over and has waited for a server, whatever became of it; `now` is a monotonic instant."""
        waits = self.models.setdefault(model, ModelMeter()).waits
        histogram = waits.get(flow.band)
        if histogram is None:
            histogram = waits[flow.band] = Histogram(WAIT_BOUNDS)
        histogram.note(seconds)
        self.recent_waits.note(model, flow, seconds, now)

    def failures(self, attempts: Iterable[FailedAttempt]) -> None:
        """Count the failed attempts of a request by server and class."""
        for attempt in attempts:
            self.attempts[attempt.server_id, attempt.failure.kind.name.lower()] += 1

    def answers(self, server_id: ServerId) -> int:
        """Return how many attempts on a server ended with an answer, of whatever kind."""
        return sum(self.attempts[server_id, outcome] for outcome in ANSWERED)

    def probe(self, outcome: str, seconds: float) -> None:
        """Count a probe: passed, failed, or undecided because the server is busy."""
        self.probes[outcome] += 1
        self.probe_seconds.note(seconds)

    def forget(self, models: Collection[str], servers: Mapping[ServerId, object]) -> None:
        """Drop the figures of what is not registered any more."""
        self.models = {name: meter for name, meter in self.models.items() if name in models or name == OTHER}
        self.attempts = Counter({key: count for key, count in self.attempts.items() if key[0] in servers})


@attrs.frozen(kw_only=True)
class Gauges:
    """The values of the gauges at the monotonic instant `at`.

    `waiting` counts requests by model and band. `servers` has the id, model, state, running attempts and speed of each server.
    """

    at: float
    requests: int
    waiting: Mapping[tuple[str, Band], int]
    servers: Sequence[tuple[ServerId, str, str, int, float | None]]
    body_bytes: int
    answer_bytes: int
    waiting_retries: int
    is_shedding: bool
    tasks: int


def families(meter: Meter, gauges: Gauges) -> Iterator[Metric]:
    """Put the figures into Prometheus' form."""
    yield InfoMetricFamily("multiverse_gateway", "The gateway.", {"version": __version__})
    requests = CounterMetricFamily("multiverse_requests", "Inference requests that have ended.", labels=("model", "status"))
    canceled = CounterMetricFamily(
        "multiverse_requests_canceled",
        "Those of the requests whose client left, or stopped reading, before the end of the response.",
        labels=("model",),
    )
    seconds = HistogramMetricFamily("multiverse_request_seconds", "Time from a request's arrival to its end.", labels=("model",))
    first = HistogramMetricFamily("multiverse_first_byte_seconds", "Time from an attempt's start to its first byte.", labels=("model",))
    tokens = CounterMetricFamily(
        "multiverse_tokens", "Tokens that servers reported, and those that came in streams that ended early.", labels=("model", "kind")
    )
    waits = HistogramMetricFamily(
        "multiverse_queue_wait_seconds",
        "Time that requests waited for a free server, without those that did not wait.",
        labels=("model", "band"),
    )
    events = CounterMetricFamily("multiverse_stream_events", "Events of streams that were relayed.", labels=("model",))
    sent = CounterMetricFamily("multiverse_sent_bytes", "Bytes of answers.", labels=("model",))
    for model, figures in sorted(meter.models.items()):
        for status, count in sorted(figures.statuses.items()):
            requests.add_metric((model, str(status)), count)
        canceled.add_metric((model,), figures.canceled)
        seconds.add_metric((model,), figures.seconds.buckets(), figures.seconds.total)
        first.add_metric((model,), figures.first_byte.buckets(), figures.first_byte.total)
        for band, histogram in sorted(figures.waits.items()):
            waits.add_metric((model, band), histogram.buckets(), histogram.total)
        tokens.add_metric((model, "prompt"), figures.prompt_tokens)
        tokens.add_metric((model, "completion"), figures.completion_tokens)
        events.add_metric((model,), figures.events)
        sent.add_metric((model,), figures.sent_bytes)
    yield from (requests, canceled, seconds, first, waits, tokens, events, sent)
    evenness = GaugeMetricFamily(
        "multiverse_queue_fairness",
        "Jain's index over the clients' mean waits in the last 5 minutes: 1 if all wait equally long, 1/n if only one of n waits.",
        labels=("model", "band"),
    )
    for (model, band), index in sorted(meter.recent_waits.evenness(gauges.at).items()):
        if model in meter.models:
            evenness.add_metric((model, band), index)
    yield evenness
    yield CounterMetricFamily(
        "multiverse_retries_refused", "Retries that the budget of their model did not allow in time.", meter.refused_retries
    )

    attempts = CounterMetricFamily(
        "multiverse_attempts",
        "Attempts that have ended; the outcome is ok, left, or the class of the failure.",
        labels=("server", "outcome"),
    )
    for (server_id, outcome), count in sorted(meter.attempts.items()):
        attempts.add_metric((server_id, outcome), count)
    yield attempts
    refusals = CounterMetricFamily("multiverse_refusals", "Inference requests rejected before a server was chosen.", labels=("code",))
    for code, count in sorted(meter.refusals.items()):
        refusals.add_metric((code,), count)
    yield refusals
    probes = CounterMetricFamily("multiverse_probes", "Probes of servers by this process.", labels=("result",))
    for outcome in ("passed", "failed", "undecided"):
        probes.add_metric((outcome,), meter.probes[outcome])
    yield probes
    yield HistogramMetricFamily(
        "multiverse_probe_seconds", "Duration of probes.", buckets=meter.probe_seconds.buckets(), sum_value=meter.probe_seconds.total
    )
    yield from _gauges(gauges)


def _gauges(gauges: Gauges) -> Iterator[Metric]:
    yield GaugeMetricFamily("multiverse_requests_in_flight", "Inference requests that are running or waiting.", gauges.requests)
    waiting = GaugeMetricFamily("multiverse_requests_waiting", "Requests that are waiting for a free server.", labels=("model", "band"))
    for (model, band), count in sorted(gauges.waiting.items()):
        waiting.add_metric((model, band), count)
    yield waiting
    running = GaugeMetricFamily("multiverse_attempts_in_flight", "Attempts that are running on a server.", labels=("server", "model"))
    states = GaugeMetricFamily("multiverse_server_state", "1 for the current state of a server.", labels=("server", "model", "state"))
    speeds = GaugeMetricFamily(
        "multiverse_server_tokens_per_second", "Tokens per second of a server's answers, a moving average.", labels=("server", "model")
    )
    for server_id, model, state, count, speed in gauges.servers:
        running.add_metric((server_id, model), count)
        states.add_metric((server_id, model, state), 1)
        if speed is not None:
            speeds.add_metric((server_id, model), speed)
    yield from (running, states, speeds)
    yield GaugeMetricFamily("multiverse_body_bytes", "Memory that request bodies take.", gauges.body_bytes)
    yield GaugeMetricFamily("multiverse_retries_waiting", "Retries that are waiting for the budget of their model.", gauges.waiting_retries)
    yield GaugeMetricFamily("multiverse_answer_bytes", "Memory that large answers take until clients have read them.", gauges.answer_bytes)
    yield GaugeMetricFamily("multiverse_shedding", "1 while requests are rejected because the process cannot keep up.", gauges.is_shedding)
    yield GaugeMetricFamily("multiverse_tasks", "Tasks of the event loop; the number is constant while the process is idle.", gauges.tasks)


@attrs.frozen(eq=False)
class _Figures(Collector):
    meter: Meter
    gauges: Gauges

    def collect(self) -> Iterable[Metric]:
        return families(self.meter, self.gauges)


def exposition(meter: Meter, gauges: Gauges) -> bytes:
    """Return the text that Prometheus reads, with the figures of the process itself."""
    registry = CollectorRegistry()
    registry.register(_Figures(meter, gauges))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return generate_latest(registry)
