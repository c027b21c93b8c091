"""The description of the API: complete, valid, and what the API does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Mount, Route

from multiverse_gateway import GatewayError, Settings, create_app
from multiverse_gateway.api.endpoints import ApiRoute
from multiverse_gateway.api.keys_and_usage import usage_csv
from multiverse_gateway.api.openapi import body_schemas, document, example_of
from multiverse_gateway.api.relayed_calls import RELAYED
from multiverse_gateway.api.request_reading import parse_change, parse_import, parse_registration, parse_test, read
from multiverse_gateway.api.request_types import ConnectionTest, Import, NewKey, Registration
from multiverse_gateway.core.addresses import EndpointError, parse_root
from multiverse_gateway.core.dialects import dialect_of
from multiverse_gateway.core.key_names import UnfitName, key_name
from multiverse_gateway.core.paths import CALLS
from multiverse_gateway.core.reading import read_envelope
from multiverse_gateway.core.registry_plans import Change
from multiverse_gateway.core.sse import EventStream
from support import behaviours
from support.backends import Backend
from support.processes import GatewayProcess
from support.require import require
from support.sockets import serving

APP = create_app(Settings(database_url="memory://", admin_api_key="an-admin-key-for-tests"))
DOCUMENT = document(APP.routes)
OPERATIONS = [(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item]
PARSERS: dict[type, Callable[[Any], Any]] = {
    Registration: parse_registration,
    ConnectionTest: parse_test,
    Change: parse_change,
    Import: parse_import,
    NewKey: lambda body: read(body, NewKey),
}


def test_every_route_is_described() -> None:
    """What is no page is an `ApiRoute`, and what is one stands in the document, in words."""
    plain = {route.path for route in APP.routes if isinstance(route, Route | Mount) and not isinstance(route, ApiRoute)}
    pages = {path for path in plain if not path.startswith(("/v1", "/admin"))}
    assert plain - pages == CALLS
    described = {route.path.replace(":path", "") for route in APP.routes if isinstance(route, ApiRoute)}
    assert set(DOCUMENT["paths"]) == described | set(RELAYED)
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            assert len(operation["description"]) > 15, (method, path)
            assert all(answer["description"] for answer in operation["responses"].values()), (method, path)
            assert {"400", "500"} <= set(operation["responses"]), (method, path)


def test_every_good_answer_has_a_schema_and_an_example_that_fits() -> None:
    """Relayed calls, texts and lists included: the author of a client sees what comes back."""
    components = {"components": {"schemas": DOCUMENT["components"]["schemas"]}}
    seen = 0
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            good = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
            assert good, (method, path)
            for status, answer in good.items():
                assert answer["content"], (method, path, status)
                for media, content in answer["content"].items():
                    where = (method, path, status, media)
                    assert content["schema"], where
                    assert content["example"], where
                    validator = jsonschema_rs.validator_for({**content["schema"], **components})
                    assert validator.is_valid(content["example"]), where
                    seen += 1
    assert seen > 30


@pytest.mark.parametrize("path", [path for path, relayed in RELAYED.items() if relayed.stream is not None])
def test_the_example_of_a_stream_is_a_whole_one(path: str) -> None:
    """What the description shows is relayed and counted as complete; a call without streams shows none."""
    relayed = RELAYED[path]
    assert relayed.stream is not None
    stream = EventStream(dialect_of(path), max_event_bytes=1 << 16)
    stream.feed(relayed.stream.encode())
    assert (stream.broken, stream.complete()) == (None, True)
    assert read_envelope(path, "application/json", json.dumps(relayed.body).encode()).model


def test_the_columns_of_the_example_are_those_of_the_answer() -> None:
    """A spreadsheet gets what the description shows."""
    shown = DOCUMENT["paths"]["/admin/usage"]["get"]["responses"]["200"]["content"]["text/csv"]["example"]
    assert shown.splitlines()[0] == usage_csv([]).splitlines()[0]


def test_a_registration_without_a_limit_is_not_described_as_one_with_null() -> None:
    """A client that fills in defaults would ask for no limit; an import without the field does mean null."""
    schemas = DOCUMENT["components"]["schemas"]
    field = schemas["RegistrationBody"]["properties"]["max_concurrency"]
    assert "default" not in field
    assert {"type": "null"} in field["anyOf"]
    assert "max_concurrency" not in schemas["RegistrationBody"]["required"]
    assert schemas["ImportedServerBody"]["properties"]["max_concurrency"]["default"] is None
    assert schemas["Registered"]["properties"]["max_concurrency_reason"]["type"] == "string"
    assert "max_concurrency_reason" in schemas["Registered"]["required"]


def test_the_document_is_valid() -> None:
    """By the schema of OpenAPI 3.1, and each example by the schema beside it."""
    schemathesis = require("schemathesis", "the description of the API")
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.validate()
    for kind in PARSERS:
        schemas, name = body_schemas(kind, "#/$defs/{name}")
        validator = jsonschema_rs.validator_for({"$ref": f"#/$defs/{name}", "$defs": schemas})
        assert validator.is_valid(example_of(kind)), kind
        PARSERS[kind](example_of(kind))


# The schema and the reading


def _is_name(text: str) -> bool:
    try:
        key_name(text)
    except UnfitName:
        return False
    return True


def _is_url(text: str) -> bool:
    try:
        parse_root(text)
    except EndpointError:
        return False
    return True


def _has_whole_floats(value: Any) -> bool:
    """JSON Schema takes 1.0 for a whole number, the gateway does not: it converts nothing."""
    if isinstance(value, dict):
        return any(map(_has_whole_floats, value.values()))
    if isinstance(value, list):
        return any(map(_has_whole_floats, value))
    return isinstance(value, float) and value.is_integer()


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-2, 5000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(
        [
            "tiny",
            "org/model:1",
            "https://gpu.example",
            "http://host:8000/v1/",
            "http://host:8000/v1/models",
            "ftp://host",
            "http://a b",
            "",
            " ",
            "a\nb",
            "Jürgen",
            "a\u202eb",
            "x" * 129,
            "x" * 1001,
            "2026-05-01T12:00:00Z",
            "2026-05-01",
            "0b9c2f6e-4a55-4c1c-9a53-0d1f7a0f7b11",
            4096,
            4097,
            100,
            101,
            1_000_000_000,
            1_000_000_001,
        ]
    )
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2), max_leaves=4
)


def likely(kind: type, *, depth: int = 0) -> st.SearchStrategy[Any]:
    """Bodies that are nearly right: known fields with values that may fit."""
    fields = [field.name for field in attrs.fields(kind)]
    needed = {field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING}
    fitting = {"model_name": st.just("tiny"), "endpoint_url": st.just("https://gpu.example"), "name": st.just("alice")}
    inner: dict[str, st.SearchStrategy[Any]] = {
        "capabilities": st.fixed_dictionaries(
            {}, optional={"max_tokens": leaves, "context_length": leaves, "streaming": leaves, "x": leaves}
        ),
        "metadata": st.fixed_dictionaries({}, optional={"student_id": leaves, "description": leaves}),
        "models": st.lists(leaves, max_size=2),
        "format": st.sampled_from([1, 2, True, "1", None]),
    }
    if kind is Import:
        inner["servers"] = st.lists(likely(Registration), max_size=2)
    each = {name: fitting.get(name, inner.get(name, leaves)) | inner.get(name, leaves) | values for name in fields}
    return st.fixed_dictionaries(
        {name: part for name, part in each.items() if name in needed},
        optional={**{name: part for name, part in each.items() if name not in needed}, "unknown": leaves},
    )


@pytest.mark.parametrize("kind", PARSERS)
def test_what_the_schema_accepts_is_what_is_read(kind: type) -> None:
    """JSON Schema and cattrs take and refuse the same bodies; addresses, times and ids are judged by our own readers in both.

    The reader drops white space around texts; the schema describes what is left.
    """
    schemas, name = body_schemas(kind, "#/$defs/{name}")
    readers = {"endpoint-url": _is_url, "uuid": _reads(kind="uuid"), "date-time": _reads(kind="instant"), "key-name": _is_name}
    validator = jsonschema_rs.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schemas}, formats=readers, validate_formats=True)
    seen = {True: 0, False: 0}

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given((likely(Registration) if kind is Change else likely(kind)) | values)
    def hold(body: Any) -> None:
        if _has_whole_floats(body):
            return
        try:
            PARSERS[kind](body)
            is_read = True
        except GatewayError:
            is_read = False
        assert validator.is_valid(_trimmed(body)) == is_read, body
        seen[is_read] += 1

    hold()
    assert min(seen.values()) > 0, "both must have been tried"


def _trimmed(value: Any) -> Any:
    """Drop white space around all texts in a body."""
    match value:
        case str():
            return value.strip()
        case list():
            return [_trimmed(item) for item in value]
        case dict():
            return {name: _trimmed(item) for name, item in value.items()}
        case _:
            return value


def _reads(*, kind: str) -> Any:
    body: dict[str, Any] = {"model_name": "tiny", "endpoint_url": "https://gpu.example"}
    field = {"uuid": "registration_id", "instant": "registered_at"}[kind]

    def judge(text: str) -> bool:
        try:
            parse_import({"servers": [{**body, field: text}]})
        except GatewayError:
            return False
        return True

    return judge


# The document and the behaviour


@pytest.fixture(scope="module")
def running() -> Iterator[GatewayProcess]:
    """Return a gateway with a server, so that there is something to find."""
    backend = Backend("tiny", behaviours.good(), models=["tiny"])
    quick = {
        "RATE_LIMIT_PER_MINUTE": "0",
        "HEALTH_CHECK_TIMEOUT_SECONDS": "1",
        "DNS_TIMEOUT_SECONDS": "0.2",
        "CONNECT_TIMEOUT_SECONDS": "0.3",
    }
    with GatewayProcess(quick) as process, serving(backend):
        process.register("tiny", backend.url)
        yield process


@pytest.mark.e2e
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{method} {path}" for method, path in OPERATIONS])
def test_the_api_does_what_the_document_says(running: GatewayProcess, method: str, path: str) -> None:
    """Schemathesis sends what the document allows and what it does not: statuses, types and contents of the answers are described."""
    schemathesis = require("schemathesis", "the description of the API")
    openapi_checks = require("schemathesis.specs.openapi.checks", "the description of the API")
    checks = [
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_headers_conformance,
        openapi_checks.response_schema_conformance,
        openapi_checks.negative_data_rejection,
    ]
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method]
    described = DOCUMENT["paths"][path][method.lower()]
    can_be_wrong = "requestBody" in described or any(part["in"] == "query" for part in described["parameters"])
    modes = [schemathesis.GenerationMode.POSITIVE, *([schemathesis.GenerationMode.NEGATIVE] if can_be_wrong else [])]
    known = [server["id"] for server in running.admin("GET", "/servers").json()]

    for mode in modes:

        @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(operation.as_strategy(generation_mode=mode))
        def hold(case: Any) -> None:
            if known and method != "DELETE" and case.meta.generation.mode.is_positive and "server_id" in (case.path_parameters or {}):
                case.path_parameters["server_id"] = known[0]
            response = case.call(base_url=running.url, headers={"x-api-key": running.admin_key}, timeout=20)
            assert response.status_code != 500, response.text
            case.validate_response(response, checks=checks)

        hold()
