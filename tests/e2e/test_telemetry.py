"""Traces and metrics, as a collector receives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e2e.deployment import deployed, operator
from multiverse_gateway import Settings, SettingsError
from multiverse_gateway.observability import telemetry
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.require import require
from support.sockets import wait_until

pytestmark = pytest.mark.e2e

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    """What OpenTelemetry's exporters send to."""

    def __init__(self) -> None:
        self.received: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}
        super().__init__(("127.0.0.1", 0), _Receiving)

    def spans(self) -> list[Any]:
        """Return all spans."""
        kind = require("opentelemetry.proto.collector.trace.v1.trace_service_pb2", "traces").ExportTraceServiceRequest
        requests = [kind.FromString(data) for data in self.received["/v1/traces"]]
        return [span for one in requests for group in one.resource_spans for scope in group.scope_spans for span in scope.spans]

    def metrics(self) -> set[str]:
        """Return the names of all metrics."""
        kind = require("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2", "metrics").ExportMetricsServiceRequest
        requests = [kind.FromString(data) for data in self.received["/v1/metrics"]]
        return {m.name for one in requests for group in one.resource_metrics for scope in group.scope_metrics for m in scope.metrics}


class _Receiving(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.received[self.path].append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing."""


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_collector_gets_spans_and_metrics() -> None:
    """By the conventions for generative AI, below the client's own span, without a word of prompts and answers."""
    require("opentelemetry.exporter.otlp.proto.http", "traces and metrics")
    with collecting() as collector:
        url = f"http://127.0.0.1:{collector.server_address[1]}"
        variables = {
            "MULTIVERSE_OTEL": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        with GatewayProcess(variables) as gateway, operator(gateway) as client:
            backends = Backend("down", behaviours.reset_first()), Backend("good")
            with deployed(gateway, client, *backends) as deployment:
                deployment.keep_down()
                headers = {"traceparent": PARENT, "x-request-id": "traced"}
                body = deployment.body(messages=[{"role": "user", "content": "a-secret-prompt"}])
                answer = deployment.client.post("/v1/chat/completions", json=body, headers=headers)
                assert (answer.status_code, answer.headers["x-multiverse-attempts"]) == (200, "2")
                wait_until(lambda: len(collector.spans()) == 1, within=10, what="no span came")
                wait_until(lambda: "gen_ai.client.token.usage" in collector.metrics(), within=10, what="no metric came")
                (span,) = collector.spans()
                assert span.name == f"chat {deployment.model}"
                assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
                assert span.end_time_unix_nano > span.start_time_unix_nano
                facts = attributes(span)
                assert (facts["gen_ai.operation.name"], facts["gen_ai.request.model"]) == ("chat", deployment.model)
                assert (facts["gen_ai.usage.input_tokens"], facts["gen_ai.usage.output_tokens"]) == (7, 5)
                assert (facts["http.response.status_code"], facts["multiverse.attempts"]) == (200, 2)
                assert (facts["multiverse.request_id"], facts["multiverse.server.id"]) == ("traced", deployment.ids[1])
                assert [event.name for event in span.events] == ["attempt failed"]
                assert {"gen_ai.server.request.duration", "gen_ai.server.time_to_first_token"} <= collector.metrics()
                assert b"a-secret-prompt" not in b"".join(collector.received["/v1/traces"])


def test_nothing_is_sent_unless_it_is_asked_for() -> None:
    observe, stop = telemetry.start(Settings())
    assert observe is None
    stop()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry.check(Settings(otel=True))
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"multiverse-gateway\[otel\]"):
        telemetry.check(Settings(otel=True))
