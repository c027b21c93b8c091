"""The latest log records, in memory: what the logs page and the admin API show."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from multiverse_gateway.observability.log_records import Entry, Note
from multiverse_gateway.observability.redaction import Redactor

TAIL_LENGTH = 2_000


class Tail:
    """The last `length` records; they are kept as given and cleaned only when they are read."""

    def __init__(self, redactor: Redactor, length: int = TAIL_LENGTH) -> None:
        self._redactor = redactor
        self.records: deque[Note | Entry] = deque(maxlen=length)
        """The records as given, the latest last."""

    def entries(
        self,
        *,
        level: str | None = None,
        component: str | None = None,
        text: str | None = None,
        client: str | None = None,
        since: float | None = None,
        after: int | None = None,
        limit: int = 200,
    ) -> list[Entry]:
        """Return the newest records first.

        `level` is the minimum level, `text` is searched for in all parts without regard to case, `client` is the value of that field,
        `since` is in epoch seconds, and `after` is the number of the last entry that the caller has seen.

        Raises:
            ValueError: There is no such level.
        """
        minimum = 0 if level is None else level_number(level)
        wanted = None if text is None else text.lower()
        selected: list[Entry] = []
        for record in reversed(list(self.records)):
            if (after is not None and record.number <= after) or len(selected) >= limit:
                break
            if record.severity < minimum or (client is not None and not _names_client(record, client)):
                continue
            entry = record if isinstance(record, Entry) else record.entry(self._redactor)
            if since is not None and entry.time < since:
                continue
            if component not in (None, entry.component) or (wanted is not None and not entry.mentions(wanted)):
                continue
            selected.append(entry)
        return selected

    def select(
        self,
        *,
        level: str | None,
        component: str | None,
        text: str | None,
        since: float | None,
        limit: int,
        client: str | None = None,
        after: int | None = None,
    ) -> list[dict[str, object]]:
        """Return the same records as `entries`, in the form of the admin API."""
        selected = self.entries(level=level, component=component, text=text, client=client, since=since, after=after, limit=limit)
        return [{"number": entry.number, **entry.as_json()} for entry in selected]


class RecentLogs:
    """The newest log records of this process, to be shown; none before `follow`, and none if no records are kept."""

    def __init__(self) -> None:
        self._tail: Tail | None = None

    def follow(self, tail: Tail) -> None:
        """Show the records of this tail."""
        self._tail = tail

    def select(
        self,
        *,
        level: str,
        component: str | None,
        text: str | None,
        since: float | None,
        limit: int,
        client: str | None = None,
        after: int | None = None,
    ) -> Sequence[Mapping[str, Any]]:
        """Return the newest records that match, of those after number `after`."""
        if self._tail is None:
            return []
        return self._tail.select(level=level, component=component, text=text, since=since, limit=limit, client=client, after=after)


def _names_client(record: Note | Entry, client: str) -> bool:
    return isinstance(record.fields, Mapping) and record.fields.get("client") == client


def level_number(level: str) -> int:
    """Return the number of a level by its name, in any case.

    Raises:
        ValueError: There is no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError("level must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL")
    return number
