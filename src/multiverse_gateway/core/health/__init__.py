"""The health of a server, and how probes and requests change it.

    PROBING        nothing is known yet                    a good probe: HEALTHY
    HEALTHY        in rotation                             a failed probe, class A, strikes: UNHEALTHY; class B after a request: SUSPECT
    SUSPECT        chosen last; probed at once             a good probe or answer: HEALTHY; a failed probe, B for another client: UNHEALTHY
    UNHEALTHY      out; probed after 1, 2, 4 … 60 s        a good probe: HALF_OPEN; failed probes in a row: DEACTIVATED
    HALF_OPEN      gets one request at a time              it passes, or a later probe does: HEALTHY; it fails: UNHEALTHY
    MISCONFIGURED  out; it refuses the gateway             a good probe that lets the gateway in: HALF_OPEN
    DEACTIVATED    taken off; probed after 1, 2, 4 … 15 min   two good probes: HEALTHY; silent for days: ARCHIVED
    ARCHIVED       not probed any more                     a forced good probe, or its owner's update

Rules that always hold:

1. An event of an older generation changes nothing.
2. Resting only ever grows longer: the later deadline wins. A busy server is not sick. A pause for which the requests of one client are the
   only reason holds for that client; the server may still answer others, until one of them is refused as well.
3. A request strikes a server at most once, and the strikes of one client take no server away from the others: after three in a row from
   one client the server is *doubted* (chosen last) for 30 s, doubling up to 5 min; a failed request of any other client then decides.
4. Every state but ARCHIVED has a next probe: time alone leaves no server stuck.
5. A good probe does not erase strikes of the last 30 s: a server may list its models and still fail to answer.
6. Any answer that proves life (a success, a client error) ends the row of strikes.
7. A refused request (401, 403) says nothing about the server: the gateway confirms it with a request of its own. A server that refuses
   that one is MISCONFIGURED until it lets such a request in; a list of models that needs no key proves nothing.
8. A busy server is not dead: while bytes of its answers arrive, a probe's timeout proves nothing; while a running request has time left,
   the timeout only makes the server SUSPECT.

The value and the questions that it answers are in `state`, the events in `events`, the figures in `policy`. `advancing` passes an event on:
`by_attempts` judges requests, `by_probes` judges probes, and `transitions` has the steps that both take. `following` takes over the
verdicts of another process, or of this one before a restart.
"""

from multiverse_gateway.core.health.advancing import advance
from multiverse_gateway.core.health.events import (
    AttemptFailed,
    AttemptPassed,
    HealthEvent,
    ProbeFailed,
    ProbePassed,
    ProbeTimedOut,
    Refused,
)
from multiverse_gateway.core.health.following import followed, fresh, merged, resume
from multiverse_gateway.core.health.policy import AutoDeregister, HealthPolicy
from multiverse_gateway.core.health.state import (
    LEAST_SHARE,
    SHARED,
    Blame,
    Health,
    HealthState,
    NextProbe,
    Rest,
    Strike,
    has_answered,
    is_last,
    is_refused,
    is_settled,
    last_until,
    needs_attention,
    supports,
    traffic_share,
)

__all__ = [
    "LEAST_SHARE",
    "SHARED",
    "AttemptFailed",
    "AttemptPassed",
    "AutoDeregister",
    "Blame",
    "Health",
    "HealthEvent",
    "HealthPolicy",
    "HealthState",
    "NextProbe",
    "ProbeFailed",
    "ProbePassed",
    "ProbeTimedOut",
    "Refused",
    "Rest",
    "Strike",
    "advance",
    "followed",
    "fresh",
    "has_answered",
    "is_last",
    "is_refused",
    "is_settled",
    "last_until",
    "merged",
    "needs_attention",
    "resume",
    "supports",
    "traffic_share",
]
