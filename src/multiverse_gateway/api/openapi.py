"""The OpenAPI 3.1 document, built from the routes, the docstrings of their endpoints and the types of their bodies and queries.

Nothing is described twice: what the document lacks, the code lacks.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from multiverse_gateway._version import __version__
from multiverse_gateway.api.endpoints import ApiRoute, Call, json_response
from multiverse_gateway.api.relayed_calls import MODEL, RELAYED, Relayed
from multiverse_gateway.api.request_types import ConnectionTest, Registration
from multiverse_gateway.api.response_types import AnthropicErrorAnswer, ErrorAnswer
from multiverse_gateway.api.samples import SERVER_ID, sample
from multiverse_gateway.core import errors
from multiverse_gateway.core.errors import GatewayError, is_anthropic
from multiverse_gateway.core.registry_plans import Change
from multiverse_gateway.core.servers import MODEL_NAME

Json = dict[str, Any]

REF = "#/components/schemas/{name}"
REQUEST_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
_RELAYED = (
    "{}. The gateway relays the body and the response unchanged, as a stream if `stream` is true; it reads only `model` and `stream`. "
    "If a server fails before its response begins, the gateway retries on another server."
)

_ANY: tuple[type[GatewayError], ...] = (errors.BadRequest, errors.LoopDetected, errors.InternalError)
_BODIED = (errors.InvalidJSON, errors.RequestTimeout, errors.RequestTooLarge, errors.CompressedRequest)
_ADMIN = (errors.AdminKeyRequired, errors.RateLimited)
_USER = (errors.InvalidClientKey, errors.RateLimited)
_INFERENCE = (
    *_USER,
    *_BODIED,
    errors.ModelForbidden,
    errors.StreamingUnsupported,
    errors.ModelNotFound,
    errors.UnknownURL,
    errors.DailyLimitReached,
    errors.BackendBusy,
    errors.UpstreamFailed,
    errors.UpstreamAuthFailed,
    errors.UpstreamBadResponse,
    errors.NoHealthyServer,
    errors.Overloaded,
    errors.ShuttingDown,
    errors.UpstreamTimeout,
)

_SECURITY = {
    "adminKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The admin key."},
    "bearerAdminKey": {"type": "http", "scheme": "bearer", "description": "The admin key."},
    "ownerToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "The token returned when a server was registered; valid only for calls about that server.",
    },
    "clientKey": {"type": "http", "scheme": "bearer", "description": "A client key, if the gateway requires one."},
    "clientKeyHeader": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same, as Anthropic's clients send it.",
    },
}
_TAGS = {
    "inference": "For clients: OpenAI's API, and other APIs that the servers support.",
    "admin": "For operators, and for owners of servers.",
    "operations": "For monitoring.",
}
_PARAMETERS: Mapping[str, Json] = {
    "model": {"description": "The name of the model.", "schema": {"type": "string"}, "example": MODEL},
    "alias": {
        "description": "The name of the alias.",
        "schema": {"type": "string", "pattern": f"^{MODEL_NAME.pattern}$"},
        "example": "class-default",
    },
    "response_id": {
        "description": "The id of the stored response.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
        "example": "resp_1",
    },
}
_ID: Json = {
    "description": "The id returned when it was created.",
    "schema": {"type": "string", "format": "uuid"},
    "example": SERVER_ID,
}
_JSON = "application/json"
_OPERATION_ID = re.compile(r"[^a-z0-9]+")


def document(routes: Iterable[BaseRoute]) -> Json:
    """Return the OpenAPI document of these routes."""
    described = [route for route in routes if isinstance(route, ApiRoute)]
    calls = [(route.path, method, call) for route in described for method, call in route.calls.items()]
    schemas = _Schemas()
    paths: Json = {}
    for path, method, call in calls:
        operation = _operation(path, method, call, schemas)
        paths.setdefault(path.replace(":path", ""), {})[method.lower()] = operation
    for path, relayed in RELAYED.items():
        paths[path] = {"post": _inference(path, relayed, schemas)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Multiverse Gateway",
            "version": __version__,
            "summary": "One reliable OpenAI-compatible API in front of many model servers.",
            "description": "All errors have the same format; `message` says what to do next. "
            "`x-request-id` identifies a request in the gateway's log; send your own, or use the one in the response.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": {"schemas": dict(sorted(schemas.components.items())), "securitySchemes": _SECURITY},
    }


class _Schemas:
    """Collect the JSON Schemas of types. Schemas of bodies are strict, and accept null for fields that have a default."""

    def __init__(self) -> None:
        self.components: Json = {}

    def answer(self, kind: Any) -> Json:
        (schema,), components = msgspec.json.schema_components([kind], ref_template=REF)
        self.components |= {name: _without_titles(component) for name, component in components.items()}
        return dict(_without_titles(schema))

    def body(self, kind: type) -> Json:
        schemas, root = body_schemas(kind)
        self.components |= schemas
        return {"$ref": REF.format(name=root)}


def body_schemas(kind: type, ref_template: str = REF) -> tuple[Json, str]:
    """Return the strict schemas of a body and of its parts by name, and the body's own name."""
    is_change = kind is Change
    _, components = msgspec.json.schema_components(
        [Registration if is_change else kind], ref_template=ref_template.replace("{name}", "{name}Body")
    )
    schemas = {f"{name}Body": _strict(_without_titles(component)) for name, component in components.items()}
    if "RegistrationBody" in schemas:  # null means no cap, and a body without the field means something else
        schemas["RegistrationBody"]["properties"]["max_concurrency"].pop("default")
    if is_change:
        whole = schemas.pop("RegistrationBody")
        description = "The fields to change; null clears an optional field."
        schemas["ChangeBody"] = {name: value for name, value in whole.items() if name != "required"} | {"description": description}
    if kind is ConnectionTest:
        schemas["ConnectionTestBody"]["required"] = ["endpoint_url"]
    return schemas, f"{kind.__name__}Body"


def _strict(schema: Json) -> Json:
    """Accept null for fields with a default, and reject unknown fields."""
    properties = {
        name: _or_null(part) if "default" in part or name not in schema["required"] else part for name, part in schema["properties"].items()
    }
    return schema | {"properties": properties, "additionalProperties": False}


def _or_null(part: Json) -> Json:
    if not part or {"type": "null"} in part.get("anyOf", ()):
        return part
    notes: Json = {name: part[name] for name in ("default", "description", "examples") if name in part}
    return {"anyOf": [{name: value for name, value in part.items() if name not in notes}, {"type": "null"}], **notes}


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _without_titles(part) for name, part in schema.items() if not (name == "title" and isinstance(part, str))}
    return [_without_titles(part) for part in schema] if isinstance(schema, list) else schema


# Operations


def _operation(path: str, method: str, call: Call, schemas: _Schemas) -> Json:
    description = inspect.cleandoc(call.endpoint.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    tag = "admin" if path.startswith("/admin") else "inference" if path.startswith("/v1") else "operations"
    refused = [*_ANY, *call.errors]
    operation: Json = {
        "operationId": _identity(method, path),
        "tags": [tag],
        "summary": re.split(r"[:;.]", description)[0],
        "description": description,
        "parameters": [*_path_parameters(path), *(_query_parameters(call.query, schemas) if call.query else ())],
        "responses": {str(status): _answer(kind, schemas, call.examples) for status, kind in call.answers.items()},
    }
    if call.body is not None:
        refused += _BODIED
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas.body(call.body), "example": example_of(call.body)}},
        }
    if tag == "admin":
        refused += _ADMIN
        operation["security"] = [{"adminKey": []}, {"bearerAdminKey": []}, *([{"ownerToken": []}] if call.for_owners else [])]
    elif tag == "inference":
        refused += _USER
        operation["security"] = [{"clientKey": []}, {"clientKeyHeader": []}, {}]
    operation["responses"] |= _refusals(refused, schemas)
    return operation


def _header_parameter(name: str, description: str, example: str) -> Json:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}, "example": example}


_PRIORITY = _header_parameter(
    "X-Multiverse-Priority", "`bulk` lets interactive requests go first; the request may wait longer while the model is busy.", "bulk"
)
_COMMENTS = _header_parameter(
    "X-Multiverse-Queue",
    "`comments` reports the place in the queue in a waiting stream. The first one sends the status, so later errors are events.",
    "comments",
)


def _inference(path: str, relayed: Relayed, schemas: _Schemas) -> Json:
    body = {
        "type": "object",
        "required": ["model"],
        "properties": {
            "model": {"type": "string", "minLength": 1, "maxLength": 256, "description": "a name that GET /v1/models lists"},
            "stream": {
                "anyOf": [{"type": "boolean"}, {"type": "null"}],
                "description": "stream the response as server-sent events",
                "default": False,
            },
        },
        "additionalProperties": True,
        "description": "Other fields are passed to the server unchanged.",
    }
    headers = {
        "x-request-id": {"description": "The id of the request in the gateway's log.", "schema": {"type": "string"}},
        "x-gateway-server-id": {"description": "The server that answered.", "schema": {"type": "string"}},
        "x-multiverse-attempts": {"description": "The number of attempts.", "schema": {"type": "integer"}},
        "x-multiverse-model": {"description": "The model that answers a request for an alias.", "schema": {"type": "string"}},
        "x-multiverse-truncated": {
            "description": "1 if the server has probably read only a part of a long text, without saying so.",
            "schema": {"type": "string"},
        },
    }
    good: Json = {
        "description": "The response of the server.",
        "headers": headers,
        "content": {"application/json": {"schema": relayed.schema, "example": relayed.answer}},
    }
    if relayed.stream is not None:
        good["content"]["text/event-stream"] = {"schema": {"type": "string"}, "example": relayed.stream}
    return {
        "operationId": _identity("POST", path),
        "tags": ["inference"],
        "summary": relayed.summary,
        "description": _RELAYED.format(relayed.summary),
        "security": [{"clientKey": []}, {"clientKeyHeader": []}, {}],
        "parameters": [_PRIORITY, *([] if relayed.stream is None else [_COMMENTS])],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body, "example": relayed.body}}},
        "responses": {"200": good}
        | _refusals([*_ANY, *_INFERENCE], schemas, path)
        | {"4XX": {"description": "A client error, as the server reports it.", "content": {"*/*": {"schema": {}}}}},
    }


def _identity(method: str, path: str) -> str:
    return _OPERATION_ID.sub("_", f"{method} {path}".lower()).strip("_")


def _path_parameters(path: str) -> Sequence[Json]:
    return [{"name": name, "in": "path", "required": True, **_PARAMETERS.get(name, _ID)} for name in re.findall(r"{(\w+)", path)]


def _query_parameters(kind: type, schemas: _Schemas) -> Sequence[Json]:
    parts, name = body_schemas(kind)
    return [
        {"name": field, "in": "query", "description": schema.get("description", ""), "schema": _sent(schema)}
        for field, schema in parts[name]["properties"].items()
    ]


def _sent(schema: Json) -> Json:
    """Return the schema of a query parameter, which can be omitted but not null."""
    kinds = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    default = {} if schema.get("default") is None else {"default": schema["default"]}
    return (kinds[0] if len(kinds) == 1 else schema) | default


def _answer(kind: Any, schemas: _Schemas, examples: Mapping[str, Any]) -> Json:
    if isinstance(kind, tuple):
        first, *others = [_answer(each, schemas, examples) for each in kind]
        return first | {"content": {name: content for answer in (first, *others) for name, content in answer["content"].items()}}
    if isinstance(kind, str):
        return {"description": "Text.", "content": {kind: {"schema": {"type": "string"}, "example": examples[kind]}}}
    description = "A list." if getattr(kind, "__origin__", None) is list else inspect.cleandoc(kind.__doc__ or "").split("\n")[0]
    schema = schemas.answer(kind)
    example = examples[_JSON] if _JSON in examples else sample(schema, schemas.components)
    return {"description": description, "content": {_JSON: {"schema": schema, "example": example}}}


def _refusals(kinds: Iterable[type[GatewayError]], schemas: _Schemas, path: str = "") -> Json:
    by_status: dict[int, list[type[GatewayError]]] = {}
    for kind in dict.fromkeys(kinds):
        by_status.setdefault(kind.status, []).append(kind)
    schema = schemas.answer(AnthropicErrorAnswer if is_anthropic(path) else ErrorAnswer)
    return {
        str(status): {
            "description": " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n")[0] for kind in kinds_of_status),
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {kind.code or "invalid": {"value": _refusal(kind, path)} for kind in kinds_of_status},
                }
            },
        }
        for status, kinds_of_status in sorted(by_status.items())
    }


def _refusal(kind: type[GatewayError], path: str) -> Json:
    message = inspect.cleandoc(kind.__doc__ or "").split("\n")[0]
    body: Json = msgspec.json.decode(GatewayError.body(kind(message), path, REQUEST_ID))
    return body


def example_of(kind: type) -> Json:
    """Return an example body, built from the examples of its fields."""
    needed = Registration if kind is Change else kind
    schemas, name = body_schemas(needed)
    whole = schemas[name]
    names = ["endpoint_url"] if kind in (Change, ConnectionTest) else whole.get("required", ["max_at_once"])
    return {field: _example(whole["properties"][field], schemas) for field in names}


def _example(schema: Json, schemas: Json) -> Any:
    if "items" in schema:
        return [_example(schema["items"], schemas)]
    if "$ref" in schema:
        inner = schemas[schema["$ref"].rpartition("/")[2]]
        return {field: _example(inner["properties"][field], schemas) for field in inner["required"]}
    return schema["examples"][0]


_EXAMPLE = {_JSON: {"openapi": "3.1.0", "info": {"title": "Multiverse Gateway", "version": __version__}, "paths": {}}}


def openapi_routes() -> list[Route]:
    """Return the route of the OpenAPI document, which is built at the first request."""
    made: dict[str, bytes] = {}

    async def openapi(request: Request) -> Response:
        """Return the OpenAPI document of this gateway."""
        root = str(request.scope.get("root_path", "")).rstrip("/") or "/"
        if root not in made:  # one copy for all clients, however slowly they read it
            made[root] = bytes(json_response(document(request.app.routes) | {"servers": [{"url": root}]}).body)
        return Response(made[root], media_type="application/json", headers={"cache-control": "no-cache"})

    return [ApiRoute("/openapi.json", name="openapi", GET=Call(endpoint=openapi, answers={200: dict[str, Any]}, examples=_EXAMPLE))]
