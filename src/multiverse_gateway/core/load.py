"""What this process has in hand: attempts per server, retries per model, and who waits for a slot.

The sum of all slots is the number of live attempts; a slot is given back exactly once.
"""

from collections import OrderedDict
from typing import TypeVar

import attrs

from multiverse_gateway.core.servers import ServerId

_Key = TypeVar("_Key", bound=str)

SMOOTHING = 0.2
LEAST_RETRIES = 3
RETRY_SHARE = 0.2


@attrs.define
class Load:
    """Count attempts and remember how fast servers answer; implements `protocols.LoadView`."""

    total: int = 0
    _servers: dict[ServerId, int] = attrs.field(factory=dict, init=False)
    _models: dict[str, int] = attrs.field(factory=dict, init=False)
    _retries: dict[str, int] = attrs.field(factory=dict, init=False)
    _latency: dict[ServerId, float] = attrs.field(factory=dict, init=False)
    _share: dict[ServerId, float] = attrs.field(factory=dict, init=False)

    def started(self, server_id: ServerId, model: str) -> None:
        """Take a slot."""
        self.total += 1
        self._servers[server_id] = self._servers.get(server_id, 0) + 1
        self._models[model] = self._models.get(model, 0) + 1

    def finished(self, server_id: ServerId, model: str, *, seconds: float | None, failed: bool, first_byte_timeout: float) -> None:
        """Give a slot back; `seconds` to the first byte count for the average, a failure as a quarter of the timeout."""
        self.total -= 1
        _decrease(self._servers, server_id)
        _decrease(self._models, model)
        if failed:
            seconds = first_byte_timeout / 4
        if seconds is not None:
            before = self._latency.get(server_id)
            self._latency[server_id] = seconds if before is None else before + SMOOTHING * (seconds - before)

    def in_flight(self, server_id: ServerId) -> int:
        """Return the attempts that run on the server."""
        return self._servers.get(server_id, 0)

    def model_in_flight(self, model: str) -> int:
        """Return the attempts that run for the model."""
        return self._models.get(model, 0)

    def latency(self, server_id: ServerId) -> float | None:
        """Return the moving average of seconds to the first byte."""
        return self._latency.get(server_id)

    def share(self, server_id: ServerId) -> float:
        """Return the part of its usual traffic that the server should get."""
        return self._share.get(server_id, 1.0)

    def set_share(self, server_id: ServerId, share: float) -> None:
        """Set that part."""
        if share >= 1.0:
            self._share.pop(server_id, None)
        else:
            self._share[server_id] = share

    def retry_started(self, model: str) -> None:
        """Count a retry that runs."""
        self._retries[model] = self._retries.get(model, 0) + 1

    def retry_finished(self, model: str) -> None:
        """Count it no more."""
        _decrease(self._retries, model)

    def retries_in_flight(self, model: str) -> int:
        """Return the retries that run for the model."""
        return self._retries.get(model, 0)

    def retry_budget_left(self, model: str) -> bool:
        """Tell whether one more retry of the model may run: fewer than three, or than a fifth of its attempts."""
        return self.retries_in_flight(model) < max(LEAST_RETRIES, RETRY_SHARE * self.model_in_flight(model))

    def forget(self, server_id: ServerId) -> None:
        """Drop what is remembered of a server that is gone; attempts that still run on it stay counted."""
        self._latency.pop(server_id, None)
        self._share.pop(server_id, None)


def _decrease(counts: dict[_Key, int], key: _Key) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]


@attrs.define
class Admission:
    """Who waits for a slot, per model, first come first served."""

    max_queue: int = 32
    max_in_flight: int = 1024
    _queues: dict[str, OrderedDict[int, object]] = attrs.field(factory=dict, init=False)

    def may_start(self, total: int) -> bool:
        """Tell whether one more request may begin while `total` are in hand."""
        return total < self.max_in_flight

    def join(self, model: str, waiter: object) -> bool:
        """Let somebody wait; false when the queue is full. Who waits already keeps the place."""
        queue = self._queues.setdefault(model, OrderedDict())
        if id(waiter) in queue:
            return True
        if len(queue) >= self.max_queue:
            return False
        queue[id(waiter)] = waiter
        return True

    def leave(self, model: str, waiter: object) -> None:
        """Take somebody out of the queue; harmless when not in it."""
        queue = self._queues.get(model)
        if queue is not None:
            queue.pop(id(waiter), None)
            self._tidy(model, queue)

    def next(self, model: str) -> object | None:
        """Take out who has waited longest."""
        queue = self._queues.get(model)
        if queue is None:
            return None
        _, waiter = queue.popitem(last=False)
        self._tidy(model, queue)
        return waiter

    def waiting(self, model: str) -> int:
        """Return how many wait."""
        return len(self._queues.get(model, ()))

    def _tidy(self, model: str, queue: OrderedDict[int, object]) -> None:
        if not queue:
            del self._queues[model]
