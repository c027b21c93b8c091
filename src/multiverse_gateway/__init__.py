"""One dependable OpenAI-compatible service out of many undependable model servers.

The public names are loaded when they are first used, so that the command line starts fast.

>>> from multiverse_gateway import Settings, create_app
>>> app = create_app(Settings(database_url="memory://"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from multiverse_gateway._version import __version__

if TYPE_CHECKING:
    from multiverse_gateway.app import create_app, lifespan
    from multiverse_gateway.core.addresses import AddressPolicy
    from multiverse_gateway.core.envelope import Envelope
    from multiverse_gateway.core.errors import AlreadyRegistered, GatewayError, ServerNotFound, StorageUnavailable
    from multiverse_gateway.core.health import Health, HealthState
    from multiverse_gateway.core.servers import Capabilities, ClientKey, Metadata, Server, ServerId, WallLink
    from multiverse_gateway.core.stored import StoredResponse
    from multiverse_gateway.core.usage import Counts, Usage, UsageKey
    from multiverse_gateway.gateway import Gateway
    from multiverse_gateway.protocols import (
        Balancer,
        Coordination,
        HealthProbe,
        LoadView,
        ProbeProblem,
        ProbeResult,
        ProbeStep,
        Registry,
        RegistryStore,
        ResponseStore,
        Scoring,
        ServerUnreachable,
        SessionStore,
        Store,
        UsageStore,
        UsageSumStore,
        WallLinkStore,
    )
    from multiverse_gateway.settings import Settings, SettingsError, load_settings

_HOMES = {
    "AddressPolicy": "multiverse_gateway.core.addresses",
    "AlreadyRegistered": "multiverse_gateway.core.errors",
    "Balancer": "multiverse_gateway.protocols",
    "Capabilities": "multiverse_gateway.core.servers",
    "ClientKey": "multiverse_gateway.core.servers",
    "Coordination": "multiverse_gateway.protocols",
    "Counts": "multiverse_gateway.core.usage",
    "Envelope": "multiverse_gateway.core.envelope",
    "Gateway": "multiverse_gateway.gateway",
    "GatewayError": "multiverse_gateway.core.errors",
    "Health": "multiverse_gateway.core.health",
    "HealthProbe": "multiverse_gateway.protocols",
    "HealthState": "multiverse_gateway.core.health",
    "LoadView": "multiverse_gateway.protocols",
    "Metadata": "multiverse_gateway.core.servers",
    "ProbeProblem": "multiverse_gateway.protocols",
    "ProbeResult": "multiverse_gateway.protocols",
    "ProbeStep": "multiverse_gateway.protocols",
    "Registry": "multiverse_gateway.protocols",
    "RegistryStore": "multiverse_gateway.protocols",
    "ResponseStore": "multiverse_gateway.protocols",
    "Scoring": "multiverse_gateway.protocols",
    "Server": "multiverse_gateway.core.servers",
    "ServerId": "multiverse_gateway.core.servers",
    "ServerNotFound": "multiverse_gateway.core.errors",
    "ServerUnreachable": "multiverse_gateway.protocols",
    "SessionStore": "multiverse_gateway.protocols",
    "Settings": "multiverse_gateway.settings",
    "SettingsError": "multiverse_gateway.settings",
    "StorageUnavailable": "multiverse_gateway.core.errors",
    "Store": "multiverse_gateway.protocols",
    "StoredResponse": "multiverse_gateway.core.stored",
    "Usage": "multiverse_gateway.core.usage",
    "UsageKey": "multiverse_gateway.core.usage",
    "UsageStore": "multiverse_gateway.protocols",
    "UsageSumStore": "multiverse_gateway.protocols",
    "WallLink": "multiverse_gateway.core.servers",
    "WallLinkStore": "multiverse_gateway.protocols",
    "create_app": "multiverse_gateway.app",
    "lifespan": "multiverse_gateway.app",
    "load_settings": "multiverse_gateway.settings",
}

__all__ = [
    "AddressPolicy",
    "AlreadyRegistered",
    "Balancer",
    "Capabilities",
    "ClientKey",
    "Coordination",
    "Counts",
    "Envelope",
    "Gateway",
    "GatewayError",
    "Health",
    "HealthProbe",
    "HealthState",
    "LoadView",
    "Metadata",
    "ProbeProblem",
    "ProbeResult",
    "ProbeStep",
    "Registry",
    "RegistryStore",
    "ResponseStore",
    "Scoring",
    "Server",
    "ServerId",
    "ServerNotFound",
    "ServerUnreachable",
    "SessionStore",
    "Settings",
    "SettingsError",
    "StorageUnavailable",
    "Store",
    "StoredResponse",
    "Usage",
    "UsageKey",
    "UsageStore",
    "UsageSumStore",
    "WallLink",
    "WallLinkStore",
    "__version__",
    "create_app",
    "lifespan",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
