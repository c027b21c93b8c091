"""Balancers, probes and stores by name: the entry points of this package and of any other that is installed."""

from importlib.metadata import entry_points
from typing import Any, cast

from multiverse_gateway.protocols import Balancer, HealthProbe, Store
from multiverse_gateway.settings import Settings, SettingsError


def available(kind: str) -> list[str]:
    """Return the names of a kind: `balancers`, `probes` or `stores`."""
    return sorted({entry.name for entry in entry_points(group=f"multiverse_gateway.{kind}")})


def load(kind: str, name: str, settings: Settings) -> Any:
    """Make the plug-in of this name.

    Raises:
        SettingsError: There is none of this name, or it cannot be loaded.
    """
    for entry in entry_points(group=f"multiverse_gateway.{kind}", name=name):
        try:
            return entry.load()(settings)
        except ImportError:
            raise SettingsError(f"{name} of {kind} cannot be loaded; install the package that it needs") from None
    raise SettingsError(f"There is no {name} among the {kind}; there are {', '.join(available(kind))}")


def balancer(settings: Settings) -> Balancer:
    """Make the balancer that the settings name."""
    return cast(Balancer, load("balancers", settings.balancer, settings))


def probe(settings: Settings) -> HealthProbe:
    """Make the probe that the settings name."""
    return cast(HealthProbe, load("probes", settings.probe, settings))


def store(settings: Settings) -> Store:
    """Make the store that the database URL names."""
    return cast(Store, load("stores", settings.database_url.partition("://")[0], settings))
