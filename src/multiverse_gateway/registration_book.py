"""What was read of the store last: the registered servers, the client keys and the sessions; and the lock under which it changes."""

from collections.abc import Mapping
from math import inf

import anyio

from multiverse_gateway.core.servers import ClientKey
from multiverse_gateway.protocols import Registry


class RegistrationBook:
    """The registry as it was read last, and its client keys by digest."""

    def __init__(self) -> None:
        self.registry = Registry(version=0, servers=(), health={})
        self.keys: Mapping[bytes, ClientKey] = {}
        self.is_loaded = False
        self.lock = anyio.Lock()
        """Held while this process changes the registry."""
        self._ended: Mapping[str, ClientKey] = {}
        self._next_end = -inf
        """When the next key expires that has not ended yet, in epoch seconds."""

    def follow(self, registry: Registry) -> None:
        """Replace what was read before."""
        self.registry = registry
        self.keys = {bytes.fromhex(key.digest): key for key in registry.keys}
        self.is_loaded = True
        self._next_end = -inf

    def ended_keys(self, wall: float) -> Mapping[str, ClientKey]:
        """Return the keys that are revoked, blocked or expired at an instant, by their ids.

        They are collected again only if the registry has changed, or another key has expired.
        """
        if wall >= self._next_end:
            keys = self.registry.keys
            self._ended = {key.id: key for key in keys if not key.works(wall)}
            ends = [key.expires_at for key in keys if key.expires_at is not None and key.id not in self._ended]
            self._next_end = min(ends, default=inf)
        return self._ended
