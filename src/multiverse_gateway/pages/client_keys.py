"""The part of the pages about what was used."""

from typing import Any
from urllib.parse import urlencode

from multiverse_gateway.accounts import usage_summary
from multiverse_gateway.api.response_types import usage_report
from multiverse_gateway.core.errors import GatewayError
from multiverse_gateway.core.usage_reports import UsageSelection, UsageSummary
from multiverse_gateway.pages.rendering import Renderer, Visit

MOST_ROWS = 31
"""How many rows of use a page shows: each day of the month by day, or what is used most."""


async def usage_values(renderer: Renderer, visit: Visit, by: str, server: str | None = None) -> dict[str, Any]:
    """Return what `_usage.html` shows: the use of the last days by day, model or another part, and where the whole table is.

    Of more rows than `MOST_ROWS` those with the most requests are shown.
    """
    try:
        summary = await usage_summary(renderer.gateway, UsageSelection(by=frozenset({by}), server=server))
    except GatewayError:
        summary = UsageSummary()
    root = str(visit.request.scope.get("root_path", "")).rstrip("/")
    query = urlencode({"format": "csv"} | ({"server": server} if server else {}))
    report = usage_report(summary)
    rows = report.rows
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: row.requests, reverse=True)[:MOST_ROWS]
    return {"usage": rows, "usage_total": len(report.rows), "by": by, "csv": f"{root}/admin/usage?{query}"}
