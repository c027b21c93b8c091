"""Balancers, probes and stores by name: the entry points of this package and of any other that is installed."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from multiverse_gateway.probes import chat, models
from multiverse_gateway.protocols import (
    Balancer,
    Coordination,
    HealthProbe,
    HostStore,
    RegistryStore,
    SessionStore,
    Store,
    UsageStore,
    UsageSumStore,
    WallLinkStore,
    methods_of,
)
from multiverse_gateway.settings import Settings
from multiverse_gateway.settings.declaration import unusable
from multiverse_gateway.stores.memory import WithHosts, WithSessions, WithUsage, WithUsageSums, WithWallLinks

GROUP = "multiverse_gateway"
_REQUIRED: Mapping[str, tuple[type, ...]] = {"balancers": (Balancer,), "probes": (HealthProbe,), "stores": (RegistryStore, Coordination)}
_OPTIONAL: Mapping[str, tuple[type, ...]] = {"stores": (SessionStore, WallLinkStore, HostStore, UsageStore, UsageSumStore)}
"""The parts that a plug-in may lack, but not by half."""
_SETTINGS = {"balancers": "balancer", "probes": "probe", "stores": "database_url"}
"""The setting that names a plug-in of each kind."""


def chat_probe(settings: Settings) -> HealthProbe:
    """Return the probe that asks for one token, whichever probe the settings name: a connection test ends with it."""
    return chat.create(settings)


def models_probe(settings: Settings) -> HealthProbe:
    """Return the probe that reads the list of models, whichever probe the settings name: it loads no model and generates no token."""
    return models.create(settings)


def available(kind: str) -> list[str]:
    """Return the names of a kind: `balancers`, `probes` or `stores`.

    >>> "round_robin" in available("balancers")
    True
    """
    return sorted({entry.name for entry in entry_points(group=f"{GROUP}.{kind}")})


def load(kind: str, name: str, settings: Settings) -> Any:
    """Make the plug-in of this name: call its entry point with the settings.

    Raises:
        SettingsError: There is none of this name, or it cannot be loaded, or it lacks a method; the message names the setting, and the
            plug-ins that there are, or the package that is to blame.
    """
    for entry in entry_points(group=f"{GROUP}.{kind}", name=name):
        made = _factory(kind, entry, settings)(settings)
        missing = _missing(kind, made)
        if missing:
            remedy = f"{name} lacks {', '.join(sorted(missing))}; install a version of {_package(entry)} for this gateway"
            raise unusable(settings, _SETTINGS[kind], remedy)
        return made
    if kind == "stores":
        remedy = (
            f"there is no store for {name}://; write sqlite:///./multiverse.db, or postgresql://user@host/database "
            f"(installed are {', '.join(available(kind))})"
        )
    else:
        remedy = (
            f"there is no {_SETTINGS[kind]} named {name}; write one of {', '.join(available(kind))}, "
            "or install the package that provides it"
        )
    raise unusable(settings, _SETTINGS[kind], remedy)


def _factory(kind: str, entry: EntryPoint, settings: Settings) -> Any:
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        remedy = f"{entry.name} cannot be loaded ({error}); install what its package {_package(entry)} needs"
        raise unusable(settings, _SETTINGS[kind], remedy) from error
    if not callable(factory):
        remedy = f"{entry.name} cannot be called; report it to the authors of its package {_package(entry)}"
        raise unusable(settings, _SETTINGS[kind], remedy)
    return factory


def _missing(kind: str, made: object) -> set[str]:
    """Return the methods that a plug-in lacks: any of a required part, and some, but not all, of an optional one."""
    parts = [*_REQUIRED[kind], *(part for part in _OPTIONAL.get(kind, ()) if not _lacks(made, part))]
    return {method for part in parts for method in methods_of(part) if not hasattr(made, method)}


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module


def balancer(settings: Settings) -> Balancer:
    """Make the balancer that the settings name."""
    return cast(Balancer, load("balancers", settings.balancer, settings))


def probe(settings: Settings) -> HealthProbe:
    """Make the probe that the settings name."""
    return cast(HealthProbe, load("probes", settings.probe, settings))


def store(settings: Settings) -> Store:
    """Make the store that the scheme of the database URL names, and complete it."""
    return completed(load("stores", settings.database_url.partition("://")[0], settings))


def completed(store: RegistryStore) -> Store:
    """Return a store with all its parts; this process keeps those that it lacks, except the required ones, in memory."""
    if _lacks(store, SessionStore):
        store = cast(RegistryStore, WithSessions(store))
    if _lacks(store, WallLinkStore):
        store = cast(RegistryStore, WithWallLinks(store))
    if _lacks(store, HostStore):
        store = cast(RegistryStore, WithHosts(store))
    if _lacks(store, UsageStore):
        store = cast(RegistryStore, WithUsage(store))
    if _lacks(store, UsageSumStore):
        store = cast(RegistryStore, WithUsageSums(store))
    return cast(Store, store)


def _lacks(made: object, part: type) -> bool:
    """Return whether there is nothing of a part."""
    return not any(hasattr(made, method) for method in methods_of(part))
