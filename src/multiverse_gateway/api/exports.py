"""Exports of the registry, and the response to an import, as types."""

from typing import Annotated

import attrs
from msgspec import UNSET, Meta, UnsetType

from multiverse_gateway.api.request_types import EXPORT_FORMAT, ExportedHost
from multiverse_gateway.api.response_types import ServerFacts, Time, facts_of, iso
from multiverse_gateway.core.hosts import shows_cap
from multiverse_gateway.core.registry_plans import ImportPlan
from multiverse_gateway.core.servers import HostId, Server
from multiverse_gateway.protocols import Registry


@attrs.frozen(kw_only=True)
class ExportedWithKey(ServerFacts):
    """A server of an export that includes the servers' API keys."""

    api_key: str | None = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class ExportedAlias:
    """An alias of an export: its name, and the models that it stands for, in order of preference."""

    name: str
    models: list[str]


@attrs.frozen(kw_only=True)
class Export:
    """The registry in the format that `POST /admin/import` accepts."""

    format: int
    exported_at: Time
    servers: Annotated[list[ServerFacts], Meta(description="with `include_keys`, each server also has its `api_key`")]
    hosts: Annotated[list[ExportedHost], Meta(description="the hosts whose servers do not show their `max_concurrency`")]
    aliases: list[ExportedAlias]


def export_of(registry: Registry, *, wall: float, include_keys: bool) -> Export:
    """Return the export of a registry; `wall` is the current time in epoch seconds."""
    exported: list[ServerFacts] = []
    by_host: dict[HostId, list[Server]] = {}
    for server in registry.servers:
        by_host.setdefault(server.host_id, []).append(server)
        facts = facts_of(server)
        exported.append(ExportedWithKey(**attrs.asdict(facts, recurse=False), api_key=server.api_key) if include_keys else facts)
    return Export(
        format=EXPORT_FORMAT,
        exported_at=iso(wall),
        servers=exported,
        hosts=[
            ExportedHost(servers=[server.id for server in by_host[host.id]], max_concurrency=host.max_concurrency)
            for host in registry.hosts
            if host.id in by_host and not shows_cap(host, by_host[host.id])
        ],
        aliases=[ExportedAlias(name=alias.name, models=list(alias.models)) for alias in registry.aliases],
    )


@attrs.frozen(kw_only=True)
class ImportCounts:
    """The number of servers that an import created, updated and left unchanged."""

    imported: int
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    aliases: Annotated[int | UnsetType, Meta(description="aliases that it created or changed; omitted if the import has none")] = UNSET


def import_counts(plan: ImportPlan) -> ImportCounts:
    """Return the number of servers that an import created, updated and left unchanged."""
    counts = {"created": plan.created, "updated": plan.updated, "unchanged": plan.unchanged}
    return ImportCounts(imported=sum(counts.values()), **counts, aliases=UNSET if plan.aliases is None else plan.aliases)
