"""What the pages of client keys show of each key: its record, and how it was used on the last days."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date

import attrs

from multiverse_gateway.accounts import usage_summary
from multiverse_gateway.api.key_records import KeyRecord
from multiverse_gateway.api.keys_and_usage import key_records
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.servers import KeyState
from multiverse_gateway.core.usage import Usage
from multiverse_gateway.core.usage_reports import DEFAULT_DAYS, UsageSelection, UsageSummary
from multiverse_gateway.gateway import Gateway
from multiverse_gateway.pages.states import Tone
from multiverse_gateway.pages.words import count

SPARK_HEIGHT = 24
SPARK_STEP = 4
"""Distance between the left edges of neighboring days, in units of the drawing."""
STATE_TONES = {
    KeyState.ACTIVE: Tone.GOOD,
    KeyState.BLOCKED: Tone.WARN,
    KeyState.EXPIRED: Tone.IDLE,
    KeyState.REVOKED: Tone.IDLE,
}


@attrs.frozen(kw_only=True)
class Sparkline:
    """Requests by day as bars, oldest first; `path` is that of an SVG drawing."""

    path: str
    summary: str
    width: int = DEFAULT_DAYS * SPARK_STEP - 1
    height: int = SPARK_HEIGHT


@attrs.frozen(kw_only=True)
class KeyUse:
    """How a key was used on the last `DEFAULT_DAYS` days; `last_used` is a day in words."""

    requests: int = 0
    tokens: int = 0
    last_used: str = "not in 30 days"
    sparkline: Sparkline | None = None


@attrs.frozen(kw_only=True)
class KeyRow:
    """A client key as the pages show it."""

    record: KeyRecord
    tone: Tone
    use: KeyUse

    @property
    def is_over(self) -> bool:
        """Whether the key is revoked or expired."""
        return self.record.state in (KeyState.EXPIRED, KeyState.REVOKED)


def sparkline_of(requests: Mapping[str, int], since: str) -> Sparkline:
    """Return the bars of the days from `since` on; a day with any request has at least a low bar.

    >>> sparkline_of({"2026-05-02": 4, "2026-05-03": 1}, "2026-05-01").path
    'M4 24v-24h3v24zM8 24v-6h3v6z'
    """
    first, most = date.fromisoformat(since).toordinal(), max(requests.values())
    bars = []
    for day, number in sorted(requests.items()):
        height = max(2, round(SPARK_HEIGHT * number / most))
        bars.append(f"M{SPARK_STEP * (date.fromisoformat(day).toordinal() - first)} {SPARK_HEIGHT}v-{height}h{SPARK_STEP - 1}v{height}z")
    busiest = max(requests, key=lambda day: requests[day])
    return Sparkline(path="".join(bars), summary=f"Requests by day, last {DEFAULT_DAYS} days: the most on {busiest}, {most:,}")


def uses_of(rows: Iterable[Usage], since: str, until: str) -> dict[str, KeyUse]:
    """Return the use of each client from counts by client and day."""
    requests: dict[str, Counter[str]] = {}
    tokens: Counter[str] = Counter()
    for usage in rows:
        if usage.counts.requests:
            requests.setdefault(usage.key.client, Counter())[usage.key.day] += usage.counts.requests
        tokens[usage.key.client] += usage.counts.prompt_tokens + usage.counts.completion_tokens
    return {
        client: KeyUse(
            requests=by_day.total(),
            tokens=tokens[client],
            last_used=_day_in_words(max(by_day), until),
            sparkline=sparkline_of(by_day, since),
        )
        for client, by_day in requests.items()
    }


def _day_in_words(day: str, today: str) -> str:
    ago = date.fromisoformat(today).toordinal() - date.fromisoformat(day).toordinal()
    return "today" if ago <= 0 else "yesterday" if ago == 1 else f"{count(ago, 'day')} ago"


async def rows_of(gateway: Gateway, *, key_id: str | None = None) -> list[KeyRow]:
    """Return all client keys by name, or one of them; while the counts cannot be read, without their use."""
    records = [record for record in key_records(gateway) if key_id in (None, record.id)]
    records.sort(key=lambda record: (record.name.casefold(), record.name))
    try:
        summary = await usage_summary(gateway, UsageSelection(by=frozenset({"client", "day"}))) if records else UsageSummary()
    except GatewayError:
        summary = UsageSummary()
    uses = uses_of(summary.rows, summary.since, summary.until)
    return [KeyRow(record=record, tone=STATE_TONES[record.state], use=uses.get(record.id, _unused(record, summary))) for record in records]


def _unused(record: KeyRecord, summary: UsageSummary) -> KeyUse:
    """Return the use of a key without any: one that is younger than the counts was never used."""
    return KeyUse(last_used="never" if summary.since and record.created_at >= summary.since else KeyUse().last_used)


def searched(rows: Sequence[KeyRow], text: str) -> list[KeyRow]:
    """Return the keys whose name has a text in it, in any case, and those whose key begins or ends with it, as far as the hint shows."""
    return [row for row in rows if _is_found(row.record, text.strip())]


def _is_found(record: KeyRecord, text: str) -> bool:
    begin, _, end = (record.hint or "").partition("…")
    has_begin = bool(begin) and (begin.startswith(text) or text.startswith(begin))
    return text.casefold() in record.name.casefold() or has_begin or (bool(end) and text == end)
