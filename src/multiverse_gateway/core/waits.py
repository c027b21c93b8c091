"""How evenly the clients of a model wait for its servers: the waits of the last minutes, summed up by client.

1. A wait is in the window for 4 to 5 minutes: waits are kept in one sum per client and minute, not one by one, so a script with
   thousands of requests takes no more memory than a person with one, and cannot push other clients out.
2. Of one minute at most `MAX_CLIENTS` sums are kept, over all models. Waits of further clients are not counted.
3. Clients appear in no result, only an index for each model and band: bulk requests are meant to wait longer than others, and the
   waits for two models cannot be compared.
"""

from collections.abc import Mapping

from attrs import define, field

from multiverse_gateway.core.fairness import Band, Flow, jain

LEAST_WAIT_SECONDS = 0.001
"""A shorter stay in the queue is not counted: a request passes through it to a free slot while others wait that may not hold the slot."""
MINUTES = 5
"""Minutes of the window, the current one included."""
MAX_CLIENTS = 2048
"""Clients of one minute whose waits are summed up, counted once for each model and band."""

_Sums = dict[tuple[str, Flow], tuple[int, float]]
"""Number and seconds of the waits, by model and flow."""


@define(eq=False)
class RecentWaits:
    """The waits of the last minutes. Instants are monotonic seconds.

    >>> waits = RecentWaits()
    >>> waits.note("llama", Flow("script"), 30.0, now=0.0)
    >>> waits.note("llama", Flow("person"), 30.0, now=1.0)
    >>> waits.evenness(now=2.0), waits.evenness(now=1000.0)
    ({('llama', <Band.INTERACTIVE: 'interactive'>): 1.0}, {})
    """

    _minutes: dict[int, _Sums] = field(factory=dict, init=False)

    def note(self, model: str, flow: Flow, seconds: float, now: float) -> None:
        """Count a wait that is over."""
        minute = int(now // 60)
        sums = self._minutes.get(minute)
        if sums is None:
            self._forget(minute)
            sums = self._minutes[minute] = {}
        key = model, flow
        tally = sums.get(key)
        if tally is not None:
            sums[key] = tally[0] + 1, tally[1] + seconds
        elif len(sums) < MAX_CLIENTS:
            sums[key] = 1, seconds

    def evenness(self, now: float) -> Mapping[tuple[str, Band], float]:
        """Return Jain's index over the clients' mean waits, by model and band, for those for which any client has waited.

        It is 1 if requests of all clients wait equally long, and 1/n if those of one of n clients wait and the others' hardly do.
        """
        self._forget(int(now // 60))
        totals: _Sums = {}
        for sums in self._minutes.values():
            for key, (count, seconds) in sums.items():
                before = totals.get(key, (0, 0.0))
                totals[key] = before[0] + count, before[1] + seconds
        means: dict[tuple[str, Band], list[float]] = {}
        for (model, flow), (count, seconds) in totals.items():
            means.setdefault((model, flow.band), []).append(seconds / count)
        return {place: jain(values) for place, values in means.items()}

    def _forget(self, minute: int) -> None:
        self._minutes = {number: sums for number, sums in self._minutes.items() if number > minute - MINUTES}
