"""Read from a server what its engine states about itself."""

import anyio

from multiverse_gateway.access_checks import headers
from multiverse_gateway.core.caps import Stated, chosen, paths_for, stated_by, target_of
from multiverse_gateway.core.servers import Server
from multiverse_gateway.protocols import Client

READ_SECONDS = 3.0
"""How long one server may take for all that is read from it."""


async def read_stated(server: Server, http: Client, *, owned_by: str | None = None, seconds: float = READ_SECONDS) -> Stated:
    """Return how many requests a server's engine says that it answers at once.

    The paths are read side by side, with the stored key. A server that does not answer within `seconds`, or not like an engine that we
    know, states nothing; that is never an error. `owned_by` is what the server's list of models says, or `None` if it is unknown.
    """
    stated_by_path: dict[str, Stated] = {}

    async def read(path: str) -> None:
        try:
            request = http.build_request("GET", f"{server.endpoint_url}{target_of(path, server.model_name)}", headers=headers(server))
            response = await http.send(request)
        except Exception:  # noqa: BLE001  whatever a stranger's server does, the registration must not fail
            return
        stated = stated_by(path, response.status_code, response.content)
        if stated is not None:
            stated_by_path[path] = stated

    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as group:
            for path in paths_for(owned_by):
                group.start_soon(read, path)
    return chosen(stated_by_path, owned_by)
