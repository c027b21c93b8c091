"""Who sends requests to models."""

import attrs

from multiverse_gateway.core.servers import ClientKey
from multiverse_gateway.core.usage import NOBODY


@attrs.frozen
class Caller:
    """Who sent a request: `quota` is what its calls are counted by, `name` what its use is, `key` the client key kept in the store.

    `limit` is in calls per minute, 0 for no limit; `None` stands for the limit of an address. `max_at_once` is how many of its requests may
    run and wait together when another one would have to wait; 0 means no limit.
    """

    quota: str
    name: str = NOBODY
    key: ClientKey | None = None
    limit: int | None = None
    max_at_once: int = 0

    @property
    def has_no_limits(self) -> bool:
        """Whether neither its calls are limited nor how many of them run at once, as for a client on this machine."""
        return self.limit == 0 and not self.max_at_once

    @property
    def daily_limit(self) -> int | None:
        """The requests to models per day that its key is for, where that says so."""
        return None if self.key is None else self.key.daily_limit

    @property
    def is_bulk(self) -> bool:
        """Whether its key is for requests whose answers no person waits for."""
        return self.key is not None and self.key.is_bulk
