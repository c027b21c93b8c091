"""What stands in the rows of every SQL database: one form of a server, its health and its checks, whatever engine keeps them."""

import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, LiteralString

import attrs
import cattrs
import msgspec

from multiverse_gateway.core.aliases import Alias
from multiverse_gateway.core.engine_facts import Measured
from multiverse_gateway.core.health import SHARED, Health, HealthState
from multiverse_gateway.core.hosts import Host, grouped, host_of
from multiverse_gateway.core.servers import Capabilities, ClientKey, HostId, Metadata, Server, ServerId, WallLink
from multiverse_gateway.core.stored import StoredResponse
from multiverse_gateway.core.usage import MAX_COUNT, Counts, Usage, UsageKey, bounded
from multiverse_gateway.protocols import ProbeResult
from multiverse_gateway.stores.vault import Vault

HISTORY = 100
"""Results that are kept of each server."""
REMOVED = 1000
"""Removed servers that are listed, and whose results are kept."""
LONGEST_LEASE = 3600.0
"""A lease that ends later was taken before a clock was set back."""
BATCH_SECONDS = 86_400.0
"""How long a batch of counts is known again."""

MOST_RESPONSES = 100_000
"""Stored responses whose places are kept."""

_SERVER = tuple(field.name for field in attrs.fields(Server))
_KEY = tuple(field.name for field in attrs.fields(ClientKey))
_WALL_LINK = tuple(field.name for field in attrs.fields(WallLink))
RESULT_COLUMNS = ("server_id", "generation", "passed", "checked_at", "duration", "reason", "warning", "unauthorized")
RESPONSE_COLUMNS = tuple(field.name for field in attrs.fields(StoredResponse))
USAGE_KEY = tuple(field.name for field in attrs.fields(UsageKey))
USAGE_COUNTS = tuple(field.name for field in attrs.fields(Counts))


_HOST = tuple(field.name for field in attrs.fields(Host))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def server_row(server: Server, vault: Vault) -> dict[str, object]:
    """Return the row of a server that is there, its key sealed."""
    return {
        **attrs.asdict(server, recurse=False),
        "api_key": vault.seal(server.api_key),
        "capabilities": _json(attrs.asdict(server.capabilities)),
        "metadata": _json(attrs.asdict(server.metadata)),
        "removed_at": None,
    }


def server_of(row: Mapping[str, Any], vault: Vault) -> Server:
    """Read a server.

    Raises:
        StorageUnavailable: Its key was sealed with a secret that the vault does not have.
    """
    facts = {name: row[name] for name in _SERVER}
    facts["host_id"] = row["host_id"] or row["id"]
    facts["api_key"] = vault.unseal(row["api_key"])
    facts["capabilities"] = cattrs.structure(msgspec.json.decode(row["capabilities"]), Capabilities)
    facts["metadata"] = cattrs.structure(msgspec.json.decode(row["metadata"]), Metadata)
    return Server(**facts)


def host_row(host: Host, vault: Vault) -> dict[str, object]:
    """Return the row of a host, its key sealed."""
    return {**attrs.asdict(host), "api_key": vault.seal(host.api_key), "offers": _json(host.offers)}


def host_of_row(row: Mapping[str, Any], vault: Vault) -> Host:
    """Read a host.

    Raises:
        StorageUnavailable: Its key was sealed with a secret that the vault does not have.
    """
    facts = {name: row[name] for name in _HOST}
    return Host(**{**facts, "api_key": vault.unseal(row["api_key"]), "offers": tuple(msgspec.json.decode(row["offers"]))})


def alias_row(alias: Alias) -> dict[str, object]:
    """Return the row of an alias."""
    return {**attrs.asdict(alias), "models": _json(alias.models)}


def alias_of_row(row: Mapping[str, Any]) -> Alias:
    """Return the alias that a row holds."""
    return Alias(**{**dict(row), "models": tuple(msgspec.json.decode(row["models"]))})


def first_hosts(rows: Iterable[Mapping[str, Any]], vault: Vault) -> list[tuple[Host, list[ServerId]]]:
    """Return the hosts of servers that an older version registered, each with its servers' ids."""
    groups = grouped(server_of(row, vault) for row in rows)
    return [(host_of(group, HostId(str(uuid.uuid4()))), [server.id for server in group]) for group in groups]


class Servers:
    """Read servers from rows, each row once: reading a registry again costs little but for what changed, above all no decrypting."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._known: dict[str, tuple[Mapping[str, Any], Server]] = {}

    def of(self, rows: Iterable[Mapping[str, Any]]) -> tuple[Server, ...]:
        """Return the servers of all rows that there are; the same object for a row that was there before.

        Raises:
            StorageUnavailable: A key was sealed with a secret that the vault does not have.
        """
        earlier, self._known = self._known, {}
        for row in rows:
            before = earlier.get(row["id"])
            self._known[row["id"]] = before if before is not None and before[0] == row else (row, server_of(row, self._vault))
        return tuple(server for _, server in self._known.values())


def health_row(server_id: ServerId, health: Health) -> dict[str, object]:
    """Return the row of a server's health.

    A suspect server is stored as a healthy one whose `by_traffic` is a number: older versions know neither the state nor any further fact,
    and read the number as a boolean. The path of a refusal and what was read from the engine are stored under names that they know, and
    ignore.
    """
    facts = {name: getattr(health, name) for name in SHARED}
    path = facts.pop("reason_path")
    if path is not None:
        facts["refused_path"] = path
    if health.measured is not None:
        facts["answered"] = health.measured
    if health.state is not HealthState.SUSPECT:
        return {"server_id": server_id, "state": health.state.value, "facts": _json(facts)}
    facts["by_traffic"] = int(health.by_traffic)
    return {"server_id": server_id, "state": HealthState.HEALTHY.value, "facts": _json(facts)}


def healths_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[ServerId, Health]]:
    """Read the health of servers; a row that a newer version wrote is left out, and its server starts unproven here."""
    for row in rows:
        with suppress(ValueError, KeyError, TypeError):
            facts = msgspec.json.decode(row["facts"])
            by_traffic = facts["by_traffic"]
            state = HealthState(row["state"]) if isinstance(by_traffic, bool) else HealthState.SUSPECT
            path = facts.pop("refused_path", None)
            if path is None and state is HealthState.MISCONFIGURED:
                path = _path_in(facts["reason"])
            measured = _measured(facts.pop("answered", None))
            facts |= {"measured": measured, "models": tuple(facts["models"]), "by_traffic": bool(by_traffic), "reason_path": path}
            yield ServerId(row["server_id"]), Health(state=state, **facts)


def _measured(value: object) -> Measured | None:
    """Read what was read from an engine; `None` for what a newer version wrote in another form."""
    try:
        return None if value is None else msgspec.convert(value, Measured)
    except msgspec.ValidationError:
        return None


_PATH_AT_THE_END = re.compile(r" \(POST (/v1/[\w/-]+)\)$")


def _path_in(reason: str | None) -> str | None:
    """Return the API path of a refusal in a row of an older version, which has it at the end of the reason only."""
    match = _PATH_AT_THE_END.search(reason or "")
    return match[1] if match is not None else None


def shown(health: Health | None) -> tuple[object, ...] | None:
    """Return what other processes have to read again when it changes."""
    if health is None:
        return None
    return health.state, health.reason, health.reason_path, health.warning, health.generation, health.measured


def kept(changes: Mapping[ServerId, Health], generations: Mapping[ServerId, int]) -> dict[ServerId, Health]:
    """Return the health that is saved: that of servers that are there, in their present generation or a newer one."""
    return {
        server_id: health
        for server_id, health in changes.items()
        if server_id in generations and health.generation >= generations[server_id]
    }


def is_news(before: Mapping[ServerId, Health], saved: Mapping[ServerId, Health]) -> bool:
    """Return whether the version grows with the health that is saved."""
    return any(shown(before.get(server_id)) != shown(health) for server_id, health in saved.items())


def still_revoked(key: ClientKey, revoked_at: float | None) -> ClientKey:
    """Return a key as it is saved in the place of one that was revoked then, or was not: nothing takes a revocation back."""
    return key if revoked_at is None else attrs.evolve(key, revoked_at=revoked_at)


def result_row(result: ProbeResult) -> dict[str, object]:
    """Return the row of a probe's result; the models that it listed are not kept."""
    return {
        **{name: getattr(result, name) for name in RESULT_COLUMNS},
        "passed": int(result.passed),
        "unauthorized": int(result.unauthorized),
    }


def result_of(row: Mapping[str, Any]) -> ProbeResult:
    """Return the result of a probe that a row holds."""
    facts = {name: row[name] for name in RESULT_COLUMNS}
    return ProbeResult(**{**facts, "passed": bool(row["passed"]), "unauthorized": bool(row["unauthorized"])})


def key_row(key: ClientKey) -> dict[str, object]:
    """Return the row of a client key."""
    return {**attrs.asdict(key), "is_bulk": int(key.is_bulk), "models": _json(key.models)}


def key_of(row: Mapping[str, Any]) -> ClientKey:
    """Return the client key that a row holds."""
    facts = {name: row[name] for name in _KEY}
    return ClientKey(**{**facts, "is_bulk": bool(row["is_bulk"]), "models": tuple(msgspec.json.decode(row["models"]))})


def wall_link_of(row: Mapping[str, Any]) -> WallLink:
    """Return the link to the wall view that a row holds."""
    return WallLink(**{name: row[name] for name in _WALL_LINK})


def usage_row(usage: Usage) -> dict[str, object]:
    """Return the row of counts."""
    return {**attrs.asdict(usage.key), **bounded_counts(attrs.asdict(usage.counts))}


def bounded_counts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in which no count is larger than a sum may be, whatever an older version kept there."""
    return {name: bounded(value) if name in USAGE_COUNTS else value for name, value in row.items()}


def usage_of(row: Mapping[str, Any]) -> Usage:
    """Read counts; one that is broken, or larger than a sum may be, is read as what `bounded` makes of it."""
    counts = Counts(**{name: bounded(row[name]) for name in USAGE_COUNTS})
    return Usage(key=UsageKey(**{name: row[name] for name in USAGE_KEY}), counts=counts)


def response_of(row: Mapping[str, Any]) -> StoredResponse:
    """Read the place of a stored response."""
    return StoredResponse(**{name: row[name] for name in RESPONSE_COLUMNS})


@attrs.frozen
class SqlDialect:
    """How an engine writes a parameter by name and by place, its largest integer type, the least and most of values, and a sum of many."""

    placeholder: str
    mark: str
    integer: str
    least: str
    most: str
    sum: str

    def count(self, column: str) -> str:
        """Return the expression that reads a count from 0 to `MAX_COUNT`, whatever is in the column."""
        return f"{self.least}({MAX_COUNT}, {self.most}(0, cast({column} as {self.integer})))"


def summing_usage(dialect: SqlDialect, by: Collection[str], only: Mapping[str, Collection[str]]) -> tuple[str, list[str]]:
    """Return the statement that sums usage counts, without its first and last day, and the values of its other parameters.

    Counts are summed as they are: `usage_of` bounds the sums.
    """
    columns = [name if name in by else f"'' as {name}" for name in USAGE_KEY]
    sums = [f"{dialect.sum.format(name)} as {name}" for name in USAGE_COUNTS]
    conditions = [f"day between {dialect.mark} and {dialect.mark}"]
    for name in USAGE_KEY:
        if name in only:
            conditions.append(f"{name} in ({', '.join([dialect.mark] * len(only[name]))})" if only[name] else "1 = 0")
    statement = f"select {', '.join([*columns, *sums])} from usage where {' and '.join(conditions)}"  # noqa: S608  our own names
    groups = ", ".join(name for name in USAGE_KEY if name in by)
    values = [value for name in USAGE_KEY for value in only.get(name, ())]
    return (f"{statement} group by {groups} order by {groups}" if groups else f"{statement} having count(*) > 0"), values


FORGET_HOSTS: LiteralString = (
    "delete from hosts where offers = '[]' and not exists "
    "(select 1 from servers where servers.host_id = hosts.id and servers.removed_at is null)"
)
"""The statement that forgets the hosts whose last server was removed, with their keys."""


def adding_usage(dialect: SqlDialect) -> str:
    """Return the statement that adds the row of counts to those that are kept; the sums stop at `MAX_COUNT`."""
    columns = (*USAGE_KEY, *USAGE_COUNTS)
    values = ", ".join(dialect.placeholder.format(name) for name in columns)
    sums = ", ".join(f"{name} = {dialect.least}({MAX_COUNT}, {dialect.count(f'usage.{name}')} + excluded.{name})" for name in USAGE_COUNTS)
    return (
        f"insert into usage ({', '.join(columns)}) values ({values}) "  # noqa: S608  our own names
        f"on conflict ({', '.join(USAGE_KEY)}) do update set {sums}"
    )
