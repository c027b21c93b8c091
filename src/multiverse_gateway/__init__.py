"""One dependable OpenAI-compatible service out of many undependable model servers.

>>> from multiverse_gateway import Settings, create_app
>>> app = create_app(Settings(database_url="memory://"))
"""

from multiverse_gateway._version import __version__
from multiverse_gateway.app import create_app, lifespan
from multiverse_gateway.core.addresses import AddressPolicy
from multiverse_gateway.core.envelope import Envelope
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.health import Health, HealthState
from multiverse_gateway.core.servers import Capabilities, Metadata, Server, ServerId
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.protocols import Balancer, HealthProbe, LoadView, ProbeResult, Registry, Store
from multiverse_gateway.settings import Settings, SettingsError, load_settings

__all__ = [
    "AddressPolicy",
    "Balancer",
    "Capabilities",
    "Envelope",
    "Gateway",
    "GatewayError",
    "Health",
    "HealthProbe",
    "HealthState",
    "LoadView",
    "Metadata",
    "ProbeResult",
    "Registry",
    "Server",
    "ServerId",
    "Settings",
    "SettingsError",
    "Store",
    "__version__",
    "create_app",
    "lifespan",
    "load_settings",
]
