"""The queue from a caller's view: the load of each model, and the places of the caller's own requests."""

from typing import cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from multiverse_gateway.api.endpoints import ApiRoute, Call, json_response
from multiverse_gateway.api.model_list import may_use
from multiverse_gateway.api.response_types import QueuedModel, QueuedRequest, QueueList
from multiverse_gateway.core.callers import Caller
from multiverse_gateway.core.fairness import Wait
from multiverse_gateway.core.routing import listed_name
from multiverse_gateway.core.servers import model_key
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.relay.server_search import ServerSearch
from multiverse_gateway.web.middleware import CALLER


def _model(gateway: Gateway, name: str) -> QueuedModel:
    counts = gateway.room.queue.counts(model_key(name))
    return QueuedModel(
        model=name, slots=counts.slots, running=counts.running, waiting=counts.waiting, people_waiting=counts.clients_waiting
    )


def _request(gateway: Gateway, wait: Wait) -> QueuedRequest:
    ticket, place = wait.ticket, wait.place
    return QueuedRequest(
        request_id=cast(ServerSearch, ticket).client_request.request_id,
        model=listed_name(gateway.table, ticket.model),
        position=place.position,
        waiting=place.waiting,
        waited_seconds=round(wait.seconds, 1),
        about_seconds=place.about_seconds,
        priority=ticket.flow.band.value,
    )


def waiting_routes(gateway: Gateway) -> list[Route]:
    """Make the route of `/v1/queue`."""

    async def show_queue(request: Request) -> Response:
        """Return the running and waiting requests of each model, and the places of the caller's own waiting requests.

        A caller is a key, or an address without one. Only what waits in the process that answers is known.
        """
        caller: Caller = request.scope[CALLER]
        models = [name for name in gateway.model_names() if may_use(request, name)]
        waits = gateway.room.queue.waits_of(caller.quota, gateway.now())
        return json_response(QueueList(data=[_model(gateway, name) for name in models], yours=[_request(gateway, wait) for wait in waits]))

    return [ApiRoute("/v1/queue", name="queue_api", GET=Call(endpoint=show_queue, answers={200: QueueList}))]
