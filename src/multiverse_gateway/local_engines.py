"""Find the engines that run on the gateway's own computer, and register one of their models as the operator wishes.

1. Nothing is looked for unless only this computer can reach the gateway (`AddressPolicy.honors_openings`), and only the pages that the
   operator opens on this computer ask for it. What was found is kept for some seconds, so that reloading a page costs nothing.
2. What is dialed is fixed: `GET /v1/models` at 127.0.0.1 and the ports of `core.engine_offers.ENGINES`, over the gateway's own wire. It
   follows no redirect, never dials the gateway's own listener, and reads at most 1 MiB within `FIND_SECONDS`.
3. Accepting an offer is the only way to open a loopback address for a server. Address and port come from `ENGINES`, never from a form.
"""

import logging
import math
from collections.abc import Sequence

import anyio
import attrs

from multiverse_gateway.core.engine_offers import ENGINES, FoundEngine, LocalEngine, Offer, found_engine, offers_of
from multiverse_gateway.core.errors import BadRequest
from multiverse_gateway.core.servers import Metadata, Server, ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import HealthProbe, ProbeResult
from multiverse_gateway.registration import Accepted, register

FIND_SECONDS = 1.0
"""How long all engines together may take to answer."""
KEPT_SECONDS = 5.0
"""How long what was found is not looked for again."""

_log = logging.getLogger("multiverse_gateway.registry")


class LocalEngines:
    """The engines of the gateway's own computer; `probe` reads their lists of models, and `engines` are those to look for."""

    def __init__(self, gateway: Gateway, probe: HealthProbe, engines: Sequence[LocalEngine] = ENGINES) -> None:
        self._gateway = gateway
        self._probe = probe
        self._engines = engines
        self._lock = anyio.Lock()
        self._found: tuple[FoundEngine, ...] = ()
        self._until = -math.inf

    async def offers(self) -> tuple[Offer, ...]:
        """Return what the operator can be offered now; nothing if other computers may reach the gateway."""
        if not self._gateway.network.address_policy.honors_openings:
            return ()
        return offers_of(await self._find(), [route.server for route in self._gateway.table.routes.values()])

    async def accept(self, port: str, model: str) -> Accepted:
        """Register a model that was offered, and open its engine's address for this server.

        Raises:
            BadRequest: The model is not offered (any more).
            ProbeRefused: The engine did not pass its probe; nothing changed.
            StorageUnavailable: It could not be saved.
        """
        offer = next((offer for offer in await self.offers() if str(offer.engine.port) == port and model in offer.models), None)
        if offer is None:
            raise BadRequest("This model is not offered on this computer any more; reload the page")
        metadata = Metadata(description=f"{offer.name} on the gateway's own computer")
        wanted = attrs.evolve(_server_of(offer.engine, self._gateway.wall()), model_name=model, metadata=metadata)
        accepted = await register(self._gateway, wanted, has_cap=False, opened_address=offer.engine.address)
        _log.info("loopback address opened", extra={"fields": {"server": accepted.server.id, "address": offer.engine.address}})
        return accepted

    async def _find(self) -> tuple[FoundEngine, ...]:
        async with self._lock:
            if self._gateway.now() >= self._until:
                self._found = await self._look()
                self._until = self._gateway.now() + KEPT_SECONDS
            return self._found

    async def _look(self) -> tuple[FoundEngine, ...]:
        """Ask all engines side by side, and return those that answered, in the order of `engines`."""
        results: dict[LocalEngine, ProbeResult] = {}

        async def ask(engine: LocalEngine) -> None:
            server = _server_of(engine, self._gateway.wall())
            results[engine] = await self._probe.check(server, self._gateway.network.client_for(server))

        with anyio.move_on_after(FIND_SECONDS):
            async with anyio.create_task_group() as group:
                for engine in self._engines:
                    group.start_soon(ask, engine)
        passed = [(engine, results[engine]) for engine in self._engines if engine in results and results[engine].passed]
        found = [found_engine(engine, result.models, result.owned_by) for engine, result in passed]
        return tuple(engine for engine in found if engine is not None)


def _server_of(engine: LocalEngine, wall: float) -> Server:
    """Return a server of an engine that stands for no model yet."""
    return Server(
        id=ServerId("local"),
        model_name=engine.name,
        endpoint_url=engine.url,
        opened_address=engine.address,
        registered_at=wall,
        created_at=wall,
        updated_at=wall,
    )
