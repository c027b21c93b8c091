"""Traces and metrics by OpenTelemetry's protocol, in the words of its conventions for generative AI.

A span is written when its request is over, so that nothing of this happens on the way of a request. Prompts and answers are in none.
Where to send is said by OpenTelemetry's own variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from multiverse_gateway._version import __version__
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.failover import FailedAttempt
from multiverse_gateway.core.servers import Server
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import unusable_value

SCOPE = "multiverse_gateway"
OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What the conventions call the calls; any other is `other`."""
MAX_MODEL = 128


class _Facts(Protocol):
    @property
    def traceparent(self) -> str | None: ...


class _Request(Protocol):
    envelope: Envelope
    request_id: str

    @property
    def facts(self) -> _Facts: ...


class _Response(Protocol):
    status: int
    error_code: str | None


class _Attempts(Protocol):
    failures: tuple[FailedAttempt, ...]
    tried: int


class _LastAttempt(Protocol):
    server: Server
    first_byte_seconds: float | None


class Finished(Protocol):
    """An exchange that is over, as far as traces and metrics read it."""

    @property
    def request(self) -> _Request:
        """What the client asked for."""

    @property
    def response(self) -> _Response:
        """What the client got for it."""

    @property
    def search(self) -> _Attempts:
        """The attempts that were made."""

    @property
    def attempt(self) -> _LastAttempt | None:
        """The last one of them."""

    @property
    def usage(self) -> tuple[int, int]:
        """The prompt and completion tokens that the server reported."""
        ...


Observe = Callable[[Finished, float, float], None]
"""Take note of a request that is over: it ended at an instant (epoch seconds) after so many seconds."""


def check(settings: Settings) -> None:
    """Find out whether what the settings ask for is installed.

    Raises:
        SettingsError: It is not.
    """
    if settings.otel and not _is_installed():
        raise unusable_value("otel", "true", "it needs a package: pip install 'multiverse-gateway[otel]'")


def _is_installed() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # a part of the way there
        return False


def start(settings: Settings) -> tuple[Observe | None, Callable[[], None]]:
    """Start what sends traces and metrics, if the settings ask for it; return what takes note, and what sends the rest and ends.

    Ending may take seconds. Providers that were set up before, as by `opentelemetry-instrument`, are used and left as they are.
    """
    if not settings.otel:
        return None, lambda: None
    from opentelemetry import metrics, trace
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    tracers, meters = trace.get_tracer_provider(), metrics.get_meter_provider()
    own: list[Any] = []
    resource = Resource.create({"service.name": "multiverse-gateway", "service.version": __version__})
    if not isinstance(tracers, TracerProvider):
        tracers = TracerProvider(resource=resource)
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        own.append(tracers)
    if not isinstance(meters, MeterProvider):
        meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], resource=resource)
        own.append(meters)

    def stop() -> None:
        for provider in own:
            provider.shutdown()

    return observer(tracers, meters), stop


def observer(tracers: Any, meters: Any) -> Observe:
    """Return what writes spans and metrics with these providers."""
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = tracers.get_tracer(SCOPE, __version__)
    meter = meters.get_meter(SCOPE, __version__)
    duration = meter.create_histogram("gen_ai.server.request.duration", "s", "Time from a request's arrival to its end.")
    first_token = meter.create_histogram("gen_ai.server.time_to_first_token", "s", "Time from an attempt's start to its first byte.")
    tokens = meter.create_histogram(
        "gen_ai.client.token.usage", "{token}", "Tokens that servers reported, and those that came in streams that ended early."
    )
    context_of = TraceContextTextMapPropagator()

    def observe(exchange: Finished, ended: float, seconds: float) -> None:
        request, search, last = exchange.request, exchange.search, exchange.attempt
        facts = describe(exchange)
        prompt, completion = exchange.usage
        details: dict[str, Any] = {
            "http.request.method": request.envelope.method,
            "url.path": request.envelope.path,
            "multiverse.request_id": request.request_id,
            "multiverse.attempts": search.tried,
        }
        if last is not None:
            details["multiverse.server.id"] = last.server.id
        if prompt or completion:
            details |= {"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": completion}
        parent = context_of.extract({"traceparent": request.facts.traceparent}) if request.facts.traceparent else None
        span = tracer.start_span(
            f"{facts['gen_ai.operation.name']} {facts['gen_ai.request.model']}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=facts | details,
            start_time=int((ended - seconds) * 1e9),
        )
        for attempt in search.failures:
            attributes = {"multiverse.server.id": attempt.server_id, "error.type": attempt.failure.kind.name.lower()}
            span.add_event("attempt failed", attributes, timestamp=int(ended * 1e9))
        if exchange.response.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int(ended * 1e9))
        duration.record(seconds, facts)
        if last is not None and last.first_byte_seconds is not None:
            first_token.record(last.first_byte_seconds, facts)
        for kind, count in (("input", prompt), ("output", completion)):
            if count:
                tokens.record(count, facts | {"gen_ai.token.type": kind})

    return observe


def describe(exchange: Finished) -> dict[str, Any]:
    """Return the attributes of a request that metrics have, too: they take few values."""
    envelope, response = exchange.request.envelope, exchange.response
    facts: dict[str, Any] = {
        "gen_ai.operation.name": OPERATIONS.get(envelope.path, "other"),
        "gen_ai.provider.name": "multiverse",
        "gen_ai.request.model": envelope.model[:MAX_MODEL] if exchange.attempt is not None else "other",
        "http.response.status_code": response.status,
    }
    if response.error_code is not None:
        facts["error.type"] = response.error_code
    return facts
