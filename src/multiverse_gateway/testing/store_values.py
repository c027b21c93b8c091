"""Values with every field set, for the tests of stores."""

from multiverse_gateway.core.hosts import Host
from multiverse_gateway.core.servers import Capabilities, ClientKey, HostId, Metadata, Server, ServerId
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import Counts, Usage, UsageKey
from multiverse_gateway.protocols import ProbeResult


def make_server(name: str = "one", **facts: object) -> Server:
    """Return a server with every field set."""
    values: dict[str, object] = {
        "id": ServerId(name),
        "model_name": "tiny",
        "endpoint_url": f"http://{name}.example:8000",
        "api_key": "the server's own key",
        "capabilities": Capabilities(max_tokens=5, context_length=7, streaming=False),
        "metadata": Metadata(student_id="s1", description="a 'quoted' \"description\"; drop table servers"),
        "max_concurrency": 3,
        "weight": 2,
        "registered_at": 1.5,
        "created_at": 1.5,
        "updated_at": 2.5,
        "owner_digest": "ab" * 32,
        "opened_address": "127.0.0.1:11434",
        "upstream_model": "org/Tiny 1 (q4)",
        "host_id": HostId(f"host of {name}"),
    }
    return Server(**{**values, **facts})  # type: ignore[arg-type]


def make_host(name: str = "host", **facts: object) -> Host:
    """Return a host with every field set."""
    values: dict[str, object] = {
        "id": HostId(name),
        "endpoint_url": f"http://{name}.example:8000",
        "api_key": "the host's own key",
        "owner": "Jürgen",
        "max_concurrency": 3,
        "offers": ("qwen*", "tiny"),
        "created_at": 1.5,
        "updated_at": 2.5,
    }
    return Host(**{**values, **facts})  # type: ignore[arg-type]


def make_result(server_id: str, number: int = 0, *, passed: bool = True) -> ProbeResult:
    """Return the result of a probe."""
    reason = None if passed else "no answer"
    return ProbeResult(server_id=ServerId(server_id), generation=1, passed=passed, checked_at=float(number), duration=0.5, reason=reason)


def make_key(name: str = "alice", **facts: object) -> ClientKey:
    """Return a client key with every field set."""
    values: dict[str, object] = {
        "id": f"id of {name}",
        "name": name,
        "digest": "cd" * 32,
        "hint": "mvg-client-Ab12…yz89",
        "created_at": 1.5,
        "expires_at": 1e10,
        "blocked_at": 3.5,
        "rate_limit": 7,
        "daily_limit": 70,
        "max_at_once": 8,
        "is_bulk": True,
        "models": ("tiny", "a/b:c"),
    }
    return ClientKey(**{**values, **facts})  # type: ignore[arg-type]


def make_usage(day: str, requests: int = 1, **parts: str) -> Usage:
    """Return counts of a day."""
    key = UsageKey(day, **{"model": "tiny", "server_id": "one", "owner": "s1", "client": "id of alice", **parts})  # type: ignore[arg-type]
    counts = Counts(requests=requests, failed=1, prompt_tokens=10 * requests, completion_tokens=1 << 40, canceled=2)
    return Usage(key=key, counts=counts)


def make_response(key: str = "a" * 64, **facts: object) -> StoredResponse:
    """Return where a stored response is."""
    values: dict[str, object] = {"key": key, "server_id": ServerId("one"), "generation": 2, "until": 1e10}
    return StoredResponse(**{**values, **facts})  # type: ignore[arg-type]
