"""Ask a server for its list of models."""

import time

import httpx2
import msgspec

from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import Client, ProbeResult
from multiverse_gateway.settings import Settings


class ModelsProbe:
    """`GET {endpoint_url}/v1/models`: a JSON answer with a list under `data` passes."""

    async def check(self, server: Server, http: Client) -> ProbeResult:
        """Probe one server; a registered model that is not listed is only worth a warning, many servers answer to any name."""
        began = time.perf_counter()
        reason: str | None = None
        unauthorized = False
        names: tuple[str, ...] = ()
        headers = {"ngrok-skip-browser-warning": "1"}
        if server.api_key is not None:
            headers["authorization"] = f"Bearer {server.api_key}"
        try:
            response = await http.get(f"{server.endpoint_url}/v1/models", headers=headers)
        except httpx2.HTTPError as error:
            reason = f"{error}: is the server running, and does it listen on that address?"
        else:
            unauthorized = response.status_code in (401, 403)
            names, reason = _read(response.status_code, response.content)
        warning = f"the server does not list the model {server.model_name}" if names and server.model_name not in names else None
        return ProbeResult(
            server_id=server.id,
            generation=server.generation,
            passed=reason is None,
            checked_at=time.time(),
            duration=time.perf_counter() - began,
            reason=reason,
            warning=warning if reason is None else None,
            unauthorized=unauthorized,
            models=names,
        )


def _read(status: int, body: bytes) -> tuple[tuple[str, ...], str | None]:
    if status in (401, 403):
        return (), "the server refuses the stored key: update the server's api_key"
    if status != 200:
        return (), f"/v1/models answered with status {status}: is this an OpenAI-compatible server?"
    try:
        listed = msgspec.json.decode(body)["data"]
        names = tuple(str(item["id"])[:256] for item in listed if isinstance(item, dict) and "id" in item)
    except (ValueError, KeyError, TypeError, RecursionError):
        return (), "/v1/models gave no list of models: is this an OpenAI-compatible server?"
    return names[:1000], None


def create(settings: Settings) -> ModelsProbe:
    """Make a probe."""
    return ModelsProbe()
