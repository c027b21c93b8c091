"""Ask a server whether it lets the gateway in."""

from collections.abc import Mapping

import httpx2

from multiverse_gateway.core.server_access import Access, judge_access
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import Client


def headers(server: Server) -> Mapping[str, str]:
    """Return the headers of the gateway's own requests: the server's key, no warning page of ngrok, and the mark that shows a loop."""
    common = {
        "accept": "application/json",
        "accept-encoding": "identity",
        "ngrok-skip-browser-warning": "1",
        "x-multiverse-hop": "1",
    }
    return common if server.api_key is None else {**common, "authorization": f"Bearer {server.api_key}"}


async def ask_for_access(server: Server, http: Client, path: str) -> Access:
    """Send an empty JSON object to an API path with the stored key, and return what the answer means; the timeout is the caller's."""
    try:
        request = http.build_request(
            "POST", f"{server.endpoint_url}{path}", headers={**headers(server), "content-type": "application/json"}, content=b"{}"
        )
        response = await http.send(request, stream=True)
        await response.aclose()
    except (httpx2.RequestError, httpx2.InvalidURL):
        return Access()
    return judge_access(response.status_code, has_key=server.api_key is not None)
