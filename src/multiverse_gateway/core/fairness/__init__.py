"""Decide which waiting request gets a free slot, so that every client gets its share of a model's servers.

Theory of operation. A *flow* is all that one client (a key or an address) asks of one model in one band. Each flow has a *counter*: the
weighted tokens of the requests that it has begun, divided by its weight. A model has a *clock*: the largest counter that a flow had when
one of its requests began. This is start-time fair queueing (Goyal, 1996) over the tokens of VTC (Sheng, 2024).

1. The flow with the least counter is next. A counter below the clock counts as the clock. Of equal flows the one that has gone longest
   without a turn is next. Within a flow, requests keep their order.
2. A flow that begins to wait is lifted to the clock: time without requests earns no credit. A counter is kept until the clock has passed
   it, or the model is idle: a short pause makes nothing cheaper.
3. A request is charged an estimate when it begins, once. When it ends, the charge becomes what was used. A request that fails over keeps
   its charge and its place.
4. If the flow of a request has no counter above the clock, every other flow begins at most one request before it, whatever requests
   cost. With n flows, S slots and T seconds of the longest request it waits (n - 1) * T / S + T seconds at most.
5. While other clients use a model, a flow holds at most half of its slots, and all bulk requests together hold at most a quarter.
   Such a share makes a request wait: where no request may wait, or no server is in rotation, there are no shares.
6. If too many requests wait, the newest one of the flow with the most waiting requests per weight is dropped.
7. A server, or a host with several models, is a *pool*. A free slot goes to the first request over all models of its pool. The model that
   ran there last goes first until a request for another one has waited `MODEL_CHANGE_SECONDS`: a change of model reloads the engine.
8. Counters and clock are in the *books* of a model. They are opened by the first request that has to wait, which charges what runs
   then, and closed a while after the last one. So a model that has slots for all requests costs a microsecond per request, and no
   request is estimated in vain.
9. Nothing remains of a flow once it has no request and the clock has passed its counter, and of no flow of an idle model. A model only
   remembers which client came last, for rule 5.

Instants are monotonic seconds. Nothing here does I/O.

Flows, bands and pools are in `flows`, the costs of requests in `costs`, accounts and books in `books`. `turns` decides whose turn it is,
`fair_queue` is the queue itself, and `places` shows where requests stand in it. `at_once` and `evenness` do not depend on the queue.
"""

from multiverse_gateway.core.fairness.at_once import AtOnce
from multiverse_gateway.core.fairness.books import OTHERS_SECONDS, Request, Ticket
from multiverse_gateway.core.fairness.costs import (
    BYTES_PER_TOKEN,
    MAX_COST,
    MAX_OUTPUT_TOKENS,
    MAX_PROMPT_TOKENS,
    OUTPUT_WEIGHT,
    USUAL_OUTPUT_TOKENS,
    actual_cost,
    estimated_cost,
)
from multiverse_gateway.core.fairness.evenness import jain
from multiverse_gateway.core.fairness.fair_queue import CLOSING_SECONDS, MODEL_CHANGE_SECONDS, FairQueue
from multiverse_gateway.core.fairness.flows import Band, Flow, Pool, Share
from multiverse_gateway.core.fairness.places import STEPS, Place, QueueCounts, Wait, in_steps

__all__ = [
    "BYTES_PER_TOKEN",
    "CLOSING_SECONDS",
    "MAX_COST",
    "MAX_OUTPUT_TOKENS",
    "MAX_PROMPT_TOKENS",
    "MODEL_CHANGE_SECONDS",
    "OTHERS_SECONDS",
    "OUTPUT_WEIGHT",
    "STEPS",
    "USUAL_OUTPUT_TOKENS",
    "AtOnce",
    "Band",
    "FairQueue",
    "Flow",
    "Place",
    "Pool",
    "QueueCounts",
    "Request",
    "Share",
    "Ticket",
    "Wait",
    "actual_cost",
    "estimated_cost",
    "in_steps",
    "jain",
]
