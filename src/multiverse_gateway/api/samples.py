"""Example responses of the admin API, built from their schemas."""

from collections.abc import Mapping
from typing import Any

from multiverse_gateway.api.relayed_calls import MODEL
from multiverse_gateway.api.response_types import EPOCH_SECONDS

Json = dict[str, Any]

SERVER_ID = "0b9c2f6e-4a55-4c1c-9a53-0d1f7a0f7b11"
_INSTANT = "2026-05-01T12:00:00.000+00:00"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "model_name": (MODEL,),
    "model": (MODEL,),
    "models": ([MODEL], 1),
    "id": (MODEL,),
    "owned_by": ("multiverse-gateway",),
    "endpoint_url": ("https://gpu.example",),
    "student_id": ("s1234567",),
    "owner": ("s1234567",),
    "description": ("A computer in room 2.14",),
    "state": ("healthy",),
    "health_status": ("healthy",),
    "servers": ("healthy",),
    "status": ("ok", "registered"),
    "total_servers": (3,),
    "active_servers": (3,),
    "available_servers": (2,),
    "healthy_servers": (2,),
    "servers_healthy": (2,),
    "servers_total": (3,),
    "unknown_servers": (0,),
    "inactive_servers": (0,),
    "consecutive_failures": (0,),
    "in_flight": (2,),
    "uptime_seconds": (86400.0,),
    "requests_handled": (43,),
    "prompt_tokens": (1200,),
    "completion_tokens": (3400,),
    "canceled": (2,),
    "checks": (100,),
    "imported": (3,),
    "owner_token": ("mvo_5d1c9fdfe1f24b0e8e7c",),
    "key": ("mvk_5d1c9fdfe1f24b0e8e7c",),
    "name": ("alice",),
    "client": ("alice",),
    "client_id": (SERVER_ID,),
    "server": (SERVER_ID,),
    "day": ("2026-05-01",),
    "since": ("2026-05-01",),
    "until": ("2026-05-31",),
    "version": ("1.0.0",),
    "format": (1,),
    "created": (2,),
    "context_length": (8192,),
    "step": ("The server answers",),
    "message": ("1 model found.",),
    "requests": ({"succeeded": 42, "failed": 1}, 42),
    "success_rate": (0.99,),
    "uptime_percentage": (99.5,),
    "uptime_24h_percentage": (99.86,),
    "uptime_7d_percentage": (98.2,),
    "mean_response_time_ms": (12.5,),
    "duration_ms": (12.5,),
    "has_api_key": (False,),
    "resting": (False,),
    "tokens_per_second": (42.5,),
    "needs_attention": (False,),
    "api_key": ("the-key-of-the-server",),
}
"""Example values by field name; the first one of the field's type is used."""


def sample(schema: Json, components: Json, name: str = "") -> Any:
    """Return an example value of a schema; `name` is the name of its field, `components` are the schemas by name."""
    if "$ref" in schema:
        return sample(components[schema["$ref"].rpartition("/")[2]], components, name)
    if "const" in schema or "enum" in schema:
        allowed = [schema["const"]] if "const" in schema else schema["enum"]
        return next((value for value in _VALUES.get(name, ()) if value in allowed), allowed[0])
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
        is_optional = len(kinds) < len(schema["anyOf"])
        return None if is_optional and name not in _VALUES and "$ref" not in kinds[0] else sample(kinds[0], components, name)
    if "format" in schema:
        return {"uuid": SERVER_ID, "date-time": _INSTANT}[schema["format"]]
    if schema.get("description") == EPOCH_SECONDS:
        return 1780000000
    kind = schema.get("type", "object")
    for value in _VALUES.get(name, ()):
        if isinstance(value, _TYPES[kind]) and isinstance(value, bool) == (kind == "boolean"):
            return value
    if kind == "object":
        return {field: sample(part, components, field) for field, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [sample(schema["items"], components)]
    return {"string": "text", "boolean": True}.get(kind, 1)
