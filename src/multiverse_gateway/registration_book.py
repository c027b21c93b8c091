"""What was read of the store last: the registered servers, the client keys and the sessions; and the lock under which it changes."""

from collections.abc import Mapping

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

    def follow(self, registry: Registry) -> None:
        """Replace what was read before."""
        self.registry = registry
        self.keys = {bytes.fromhex(key.digest): key for key in registry.keys}
        self.is_loaded = True
